"""Seconds of a full training step of C coders: bsc, sparsify, dictionary_learning, SAELens, saev.

Every peer has an environment of its own, made once, and runs what its own trainer runs per step,
without a language model. All see the same rows, made from one seed; AuxK is off for all; k cycles
over 16, 32, 64 and 128. For each C the participants run in turn, each in a fresh process, several
times over; the first steps are not timed, and the more coders, the fewer steps. Every process
checks what it timed: C coders, L0 = k for each, errors finite and falling. Ratios are between rows
of the same site and optimiser. What a step of each does more or less than the others is said
beside the figures. The last line is JSON.

    python benchmarks/bench_peers.py --venvs PEERS [--saev-source CHECKOUT] [--threads 2]

The scripts in peers/ import `Params` and `measure` from here, in environments without bsc.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

K = (16, 32, 64, 128)
TORCH = "torch==2.13.0"
DATA_BATCHES = 8
LOOK_ROWS = 256
LR = 3e-4
"""Small and constant for all, so that errors fall from the first step; it does not decide times."""


class Peer(NamedTuple):
    """Packages of an environment, and what is to be said of a peer's step."""

    packages: tuple[str, ...]
    """Installed with what they need."""
    alone: tuple[str, ...]
    """Installed with `--no-deps`, since their pins conflict or pull what a step does not use."""
    notes: str


_HUGGING_FACE = ("transformers==5.23.0", "datasets==5.2.0", "safetensors==0.8.0")
PEERS = {
    "sparsify": Peer(
        (TORCH, *_HUGGING_FACE, "accelerate==1.15.0", "einops==0.8.2", "natsort==8.4.0",
         "psutil==7.2.2", "schedulefree==1.4.1", "simple-parsing==0.1.9"),
        ("eai-sparsify==1.3.3",),
        "float32; sparse decode, gathers rows x k x d for the encoder's gradient; loop over "
        "coders; Adam is torch's default, not fused; counts fired latents, reads the loss",
    ),
    "dictionary_learning": Peer(
        (TORCH, "einops==0.8.2", "numpy==2.4.6", "tqdm==4.70.1"),
        ("dictionary-learning==0.1.0",),
        "float32; dense decode; no transcoders; loop over coders; Adam is torch's default, not "
        "fused; clips gradients, unit decoder, counts fired latents, reads the loss",
    ),
    "SAELens": Peer(
        (TORCH, *_HUGGING_FACE, "beartype==0.23.1", "einops==0.8.2", "jaxtyping==0.3.11",
         "nltk==3.10.4", "numpy==2.4.6", "pydantic==2.14.3", "python-dotenv==1.2.4",
         "requests==2.34.2", "simple-parsing==0.1.9", "tenacity==9.2.1", "typeguard==4.6.0"),
        ("sae-lens==6.54.12", "transformer-lens==3.9.0", "babe==0.0.8", "better-abc==0.0.3",
         "fancy-einsum==0.0.3", "py2store==0.1.24"),
        "float32; dense decode (use_sparse_activations fails in its backward pass on CPU); no "
        "TopK transcoders; loop over coders; Adam is torch's default, not fused; clips gradients, "
        "decoder norms in the selection, firing statistics",
    ),
    "saev": Peer(
        (TORCH, "beartype==0.23.1", "einops==0.8.2", "jaxtyping==0.3.11", "numpy==2.4.6",
         "orjson==3.13.0", "psutil==7.2.2", "scipy==1.17.1", "tyro==1.0.17"),
        (),
        "float32; dense decode; no transcoders; all forward passes before all backward passes; "
        "fused Adam; clips gradients, unit decoder, counts fired latents",
    ),
}  # fmt: skip
BSC_NOTES = (
    "bfloat16 products with float32 sums and weights; sparse decode; --compile; fused Adam; half "
    "of the coders binary; counts fired latents, tests losses and biases for finiteness; unit "
    "decoder in SAEs"
)
NO_SAEV = "not run: no --saev-source; saev 0.1.0 on PyPI is an older code, without TopK"


class Participant(NamedTuple):
    """One row of the table."""

    tool: str
    site: str
    optimiser: str


PARTICIPANTS = (
    Participant("bsc", "sae", "adam"),
    Participant("sparsify", "sae", "adam"),
    Participant("dictionary_learning", "sae", "adam"),
    Participant("SAELens", "sae", "adam"),
    Participant("saev", "sae", "adam"),
    Participant("bsc", "sae", "signum"),
    Participant("sparsify", "sae", "signum"),
    Participant("bsc", "skip_transcoder", "adam"),
    Participant("sparsify", "skip_transcoder", "adam"),
)


@dataclass
class Params:
    """What a participant is asked for, and the rows that it trains on."""

    site: str
    optimiser: str
    d: int
    latents: int
    k: list[int]
    """One per coder."""
    batch: int
    warmup: int
    steps: int
    threads: int
    seed: int
    x: Tensor = field(init=False)
    y: Tensor = field(init=False)

    def __post_init__(self) -> None:
        """Make the rows: of low rank with noise, variance near 1, `y` a function of `x`."""
        generator = torch.Generator().manual_seed(self.seed)
        rows, rank = self.batch * DATA_BATCHES, 32

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        hidden = normal(rows, rank)
        self.x = (hidden @ normal(rank, self.d)).mul_(rank**-0.5).add_(normal(rows, self.d) / 4)
        self.y = self.x
        if self.site != "sae":
            out = hidden.relu() @ normal(rank, self.d)
            self.y = out.mul_((2 / rank) ** 0.5).add_(normal(rows, self.d) / 4)

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of `x` and `y`, over and over."""
        pairs = list(zip(self.x.split(self.batch), self.y.split(self.batch), strict=True))
        return itertools.cycle(pairs)

    def probe(self) -> tuple[Tensor, Tensor]:
        """A few rows to look at the coders with, few so as not to raise the peak of memory."""
        return self.x[:LOOK_ROWS], self.y[:LOOK_ROWS]


Step = Callable[[], None]
Look = Callable[[], list[tuple[float, float]]]
"""Fraction of variance unexplained and L0 of every coder on the probe."""


def fvu(y: Tensor, y_hat: Tensor) -> float:
    """Squared error over the variance of the rows."""
    return float((y - y_hat).square().sum() / (y - y.mean(0)).square().sum())


def memory(entry: str) -> int:
    """Bytes of an entry of this process's status: VmRSS now, VmHWM at its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{entry}:"))


def measure(make: Callable[[Params], tuple[Step, Look]], versions: dict[str, str]) -> None:
    """Time the steps that `make` makes for the parameters in argv; check; print one JSON line."""
    params = Params(**json.loads(sys.argv[1]))
    torch.set_num_threads(params.threads)
    before = memory("VmRSS")
    step, look = make(params)
    first = look()
    for _ in range(params.warmup):
        step()
    seconds = []
    for _ in range(params.steps):
        started = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - started)
    peak = memory("VmHWM")
    last = look()
    assert len(first) == len(last) == len(params.k), (len(first), len(last))
    for (fvu_first, _), (fvu_last, l0), k in zip(first, last, params.k, strict=True):
        assert fvu_last < fvu_first < float("inf"), (fvu_first, fvu_last)
        assert 0.9 * k <= l0 <= k, (l0, k)
    facts = {
        "seconds": seconds, "peak_rss": peak, "rss_before": before,
        "fvu": [statistics.fmean(f for f, _ in quality) for quality in (first, last)],
        "l0": statistics.fmean(l0 for _, l0 in last), "k": statistics.fmean(params.k),
        "threads": torch.get_num_threads(), "rows_sum": float(params.x.double().sum()),
        "versions": {"torch": torch.__version__} | versions,
    }  # fmt: skip
    print(json.dumps(facts))


def environment(folder: Path, peer: Peer) -> str:
    """The interpreter of a peer's environment, made where it is not there as described."""
    stamp, wanted = folder / "packages.json", json.dumps([peer.packages, peer.alone])
    python = str(folder / "bin/python")
    if stamp.exists() and stamp.read_text() == wanted:
        return python
    print(f"making {folder}", file=sys.stderr)
    venv.create(folder, clear=True, with_pip=True)
    install = [python, "-m", "pip", "install", "-q"]
    subprocess.run([*install, *peer.packages], check=True, stdout=sys.stderr)
    if peer.alone:
        subprocess.run([*install, "--no-deps", *peer.alone], check=True, stdout=sys.stderr)
    stamp.write_text(wanted)
    return python


def run(python: str, tool: str, params: dict[str, Any], saev: Path | None) -> dict[str, Any] | None:
    """One process of one participant; None where it failed."""
    here = Path(__file__).resolve().parent
    paths = [str(here)]
    if tool == "bsc":
        paths.append(str(here.parent))
    if tool == "saev" and saev is not None:
        paths.append(str(saev / "src"))
    threads = str(params["threads"])
    variables = {
        "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads, "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    script = here / "peers" / f"{tool.lower()}_train.py"
    done = subprocess.run(
        [python, str(script), json.dumps(params)],
        env=os.environ | variables, capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        print(f"{tool}: {params}\n{done.stderr}", file=sys.stderr)
        return None
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def summary(runs: list[dict[str, Any]], coders: int, batch: int) -> dict[str, Any]:
    """Figures of a participant at one C from its rounds."""
    seconds = statistics.median(statistics.median(r["seconds"]) for r in runs)
    steps = [s for r in runs for s in r["seconds"]]
    return {
        "seconds": seconds, "min": min(steps), "max": max(steps),
        "runs": [r["seconds"] for r in runs],
        "coder_rows_per_s": coders * batch / seconds,
        "peak_rss": max(r["peak_rss"] for r in runs), "rss_before": runs[-1]["rss_before"],
        "fvu": runs[-1]["fvu"], "l0": runs[-1]["l0"], "k": runs[-1]["k"],
    }  # fmt: skip


def fewer(steps: int, coders: int) -> int:
    """Steps at this C, where one step is that of many coders: over sqrt(C), 1 at least."""
    return max(1, round(steps / math.sqrt(coders)))


def hardware() -> dict[str, Any]:
    """Processor and number of cores."""
    about = Path("/proc/cpuinfo")
    names = [
        line.partition(":")[2].strip()
        for line in (about.read_text().splitlines() if about.exists() else [])
        if line.startswith("model name")
    ]
    return {"cpu": names[0] if names else platform.processor(), "cores": os.cpu_count()}


def commit(folder: Path) -> str:
    """Commit of a checkout, with a + where tracked files differ from it."""
    git = ["git", "-C", str(folder)]
    found = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
    changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True)
    return (found.stdout.strip() or "unknown") + ("+" if changed.stdout else "")


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    cache = Path(tempfile.gettempdir()) / "bsc-bench-peers"
    parser.add_argument("--venvs", type=Path, default=cache, help="folder of the environments")
    parser.add_argument("--saev-source", type=Path, help="a git checkout of saev")
    parser.add_argument("--only", nargs="+", help="tools to run; all without it")
    parser.add_argument("--coders", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--d", type=int, default=576)
    parser.add_argument("--latents", type=int, default=9216)
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--warmup", type=int, default=3, help="steps before those, as --steps")
    parser.add_argument(
        "--steps", type=int, default=5, help="timed in a round at C = 1; over sqrt(C) at other C"
    )
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if unknown := {*(args.only or ())} - {"bsc", *PEERS}:
        parser.error(f"--only: {sorted(unknown)}, where the tools are {['bsc', *PEERS]}")
    return args


def main() -> None:
    """Run the participants in turn and print a table and one line of JSON."""
    from bsc.versions import versions

    args = parse()
    tools = [t for t in ("bsc", *PEERS) if t in (args.only or ("bsc", *PEERS))]
    notes = {"bsc": BSC_NOTES} | {name: peer.notes for name, peer in PEERS.items()}
    if "saev" in tools and args.saev_source is None:
        tools.remove("saev")
        notes["saev"] = NO_SAEV
    pythons = {
        t: sys.executable if t == "bsc" else environment(args.venvs / t, PEERS[t]) for t in tools
    }
    saev = args.saev_source and args.saev_source.resolve()
    participants = [p for p in PARTICIPANTS if p.tool in tools]
    found: dict[tuple[Participant, int], list[dict[str, Any]]] = {}
    rows_sum: dict[str, float] = {}
    failed: list[str] = []
    for coders in args.coders:
        for _ in range(args.rounds):
            for p in participants:
                one = run(
                    pythons[p.tool], p.tool,
                    {"site": p.site, "optimiser": p.optimiser, "d": args.d,
                     "latents": args.latents, "k": [K[c % len(K)] for c in range(coders)],
                     "batch": args.batch, "warmup": fewer(args.warmup, coders),
                     "steps": fewer(args.steps, coders), "threads": args.threads,
                     "seed": args.seed},
                    saev,
                )  # fmt: skip
                if one is None:
                    failed.append(f"C={coders} {' '.join(p)}")
                    continue
                assert one["rows_sum"] == rows_sum.setdefault(p.site, one["rows_sum"]), p
                found.setdefault((p, coders), []).append(one)
                seconds = statistics.median(one["seconds"])
                print(f"C={coders} {' '.join(p)}: {seconds:.3f} s a step", file=sys.stderr)
    results = []
    print(
        "| C | tool | site | optimiser | s a step (min to max) | coder-rows/s | peak RSS, GB "
        "| bsc is faster by |\n|---|---|---|---|---|---|---|---|",
        file=sys.stderr,
    )
    for (p, coders), runs in found.items():
        row = p._asdict() | {"coders": coders} | summary(runs, coders, args.batch)
        ours = found.get((Participant("bsc", p.site, p.optimiser), coders))
        if ours is not None:
            rate = summary(ours, coders, args.batch)["coder_rows_per_s"]
            row["bsc_over_this"] = rate / row["coder_rows_per_s"]
        results.append(row)
        print(
            f"| {coders} | {' | '.join(p)} | {row['seconds']:.3f} ({row['min']:.3f} to "
            f"{row['max']:.3f}) | {row['coder_rows_per_s']:,.0f} | {row['peak_rss'] / 1e9:.2f} "
            f"| {row.get('bsc_over_this', float('nan')):.2f} |",
            file=sys.stderr,
        )
    for tool, note in notes.items():
        print(f"{tool}: {note}", file=sys.stderr)
    seen = {p.tool: runs[-1]["versions"] for (p, _), runs in found.items()}
    if "saev" in seen and saev is not None:
        seen["saev"]["saev"] = commit(saev)
    facts = {
        "command": shlex.join(sys.argv), "commit": commit(Path(__file__).parent),
        "hardware": hardware(),
        "threads": args.threads, "versions": versions(), "peer_versions": seen,
        "d": args.d, "latents": args.latents, "batch": args.batch, "k": K, "auxk": "off for all",
        "warmup": {c: fewer(args.warmup, c) for c in args.coders}, "rounds": args.rounds,
        "notes": notes, "failed": failed,
    }  # fmt: skip
    print(json.dumps({"benchmark": "peers", "results": results} | facts))
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()

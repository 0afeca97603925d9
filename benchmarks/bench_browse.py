"""What `bsc browse` takes: seconds, memory and bytes.

    python -m benchmarks.bench_browse demo --run bsc-demo/runs/demo [--repeats 3]
    python -m benchmarks.bench_browse wide --work /tmp/wide [--latents 36864] [--tokens 1000000]

demo: all pages of a run, in a process of its own as a user starts it, and how long the imports of
that process take beside it. wide: one coder with many latents on many held-out tokens of the
embedded model, captured, trained for a moment and evaluated first, where that is not there. Both
open the index of a coder and a latent in headless Chromium and say how long until it is seen. The
last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.measure import spread
from bsc.cache.capture.capture import capture
from bsc.cache.capture.config import CaptureConfig
from bsc.cache.model.text_source import TextSource
from bsc.eval.config import EvalConfig
from bsc.eval.evaluate import evaluate
from bsc.train.config import TrainConfig
from bsc.train.run import Run
from bsc.train.trainer import train_sweep
from bsc.versions import versions

_BROWSE = "import sys; from bsc.cli import main; main(sys.argv[1:])"
_NOTHING = "import torch, transformers, bsc.eval.browse.browse"


def timed(*arguments: str) -> float:
    """Seconds of a Python process."""
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", *arguments], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def browsed(run: Path, repeats: int, out: Path) -> dict[str, Any]:
    """Seconds, peak memory and bytes of all pages of a run."""
    seconds, imports = [], []
    for _ in range(repeats):
        imports.append(timed(_NOTHING))
        seconds.append(timed(_BROWSE, "browse", str(run), "--out", str(out)))
    files = [p.stat().st_size for p in out.rglob("*") if p.is_file()]
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    return {
        "seconds": spread(seconds), "imports_seconds": spread(imports), "files": len(files),
        "bytes": sum(files), "peak_bytes": peak, "opened_seconds": _opened(out),
    }  # fmt: skip


def _opened(out: Path) -> dict[str, float] | None:
    """Seconds until the rows of a coder's table, and its first latent, are seen; medians of 5."""
    chromium = shutil.which("chromium")
    if chromium is None:
        return None
    from playwright.sync_api import sync_playwright

    coder = next((out / "coders").iterdir())
    found: dict[str, list[float]] = {"table": [], "latent": []}
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for _ in range(5):
            page = browser.new_page(viewport={"width": 1500, "height": 900})
            started = time.perf_counter()
            page.goto((coder / "index.html").resolve().as_uri(), wait_until="commit")
            page.locator(".rows tbody tr[data-row]").first.wait_for()
            found["table"].append(time.perf_counter() - started)
            page.frame_locator("iframe").locator("h1").wait_for()
            found["latent"].append(time.perf_counter() - started)
            page.close()
        browser.close()
    return {name: round(statistics.median(times), 3) for name, times in found.items()}


def wide_run(work: Path, latents: int, tokens: int) -> Run:
    """A run of one wide coder, evaluated on many held-out tokens."""
    store, run = work / "acts", Run(work / "runs" / "wide")
    if not (run.folder / "eval.json").exists():
        if not store.exists():
            text = TextSource(corpus="env", held_out=0.5)
            capture(
                CaptureConfig(
                    model="demo", store=store, text=text, hookpoints=("layers.3.mlp",),
                    tokens=200_000, held_out_tokens=tokens,
                )
            )  # fmt: skip
        if not run.folder.exists():
            train_sweep(
                TrainConfig(
                    store=store, runs=work / "runs", name="wide", tokens=200_000,
                    coders=({"code": "continuous", "k": 32, "n_latents": latents},),
                )
            )  # fmt: skip
        evaluate(
            run, EvalConfig(ce_tokens=4_096, ablation_bins=0, ultra_ablations=0, probes=())
        )  # fmt: skip
    return run


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["demo", "wide"])
    parser.add_argument("--run", type=Path, default=Path("bsc-demo/runs/demo"))
    parser.add_argument("--work", type=Path, default=Path("bench-browse"))
    parser.add_argument("--latents", type=int, default=36_864)
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    run = args.run
    if args.what == "wide":
        run = wide_run(args.work, args.latents, args.tokens).folder
    with tempfile.TemporaryDirectory() as folder:
        found = browsed(run, args.repeats, Path(folder) / "pages")
    print(json.dumps({"benchmark": f"browse {args.what}", "result": found, "versions": versions()}))


if __name__ == "__main__":
    main()

"""One coder by one process, and by two that share its rows.

On this machine's cores: one process with two threads, and two processes with one thread each, that
sum their gradients by gloo, on the same batches of a store that is made for it. In turn.

* rows per second of both, and what the sum of the gradients alone takes: the two may be slower by
  no more than that.
* final FVU and held-out FVU of both.

The last line is JSON.

    python -m benchmarks.bench_team --batch-rows 8192
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import machine, ratio, spread
from bsc.train.run import Run
from bsc.versions import versions

SUM = """
import os, sys, time, json, statistics, torch, torch.distributed as dist
torch.set_num_threads(1)
dist.init_process_group("gloo")
sizes = json.loads(sys.argv[1])
tensors = [torch.randn(n) for n in sizes]
seconds = []
for i in range(13):
    dist.barrier()
    started = time.perf_counter()
    for t in tensors:
        dist.all_reduce(t)
        t /= 2
    if i > 2:
        seconds.append(time.perf_counter() - started)
if dist.get_rank() == 0:
    print(json.dumps(statistics.median(seconds)))
dist.destroy_process_group()
"""


def start(arguments: list[str], processes: int) -> str:
    """Run a program in so many processes; what it printed."""
    env = os.environ | {
        "OMP_NUM_THREADS": str(2 // processes),
        "MKL_NUM_THREADS": str(2 // processes),
    }
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*torchrun, "--nproc-per-node", str(processes), *arguments]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    return done.stdout


def train(store: Path, work: Path, name: str, processes: int, batch: int, latents: int) -> Run:
    """A run of one continuous transcoder."""
    shutil.rmtree(work / "runs" / name, ignore_errors=True)
    start(
        [
            "-m", "bsc", "train", "--store", str(store), "--runs", str(work / "runs"), "--name",
            name, "--site", "transcoder", "--code", "continuous", "--k", "32", "--n-latents",
            str(latents), "--batch-rows", str(batch), "--eval-every", "1000000",
        ],
        processes,
    )  # fmt: skip
    return Run.open(work / "runs" / name)


def rate(run: Run) -> float:
    """Rows per second of its steps but the first lines of metrics."""
    lines = [(m["rows"], m["seconds"]) for m in run.metrics()]
    (r0, s0), (r1, s1) = lines[0], lines[-1]
    return float(r1 - r0) / float(s1 - s0)


def last(run: Run) -> dict[str, float]:
    """Final figures."""
    found: dict[str, Any] = list(run.metrics())[-1]
    return {name: found[name] for name in ("fvu", "held_out_fvu", "l0") if name in found}


def main() -> None:
    """Capture, train, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--batch-rows", type=int, default=8192)
    parser.add_argument("--tokens", default="1.5M")
    parser.add_argument("--latents", type=int, default=6144)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    work = Path(tempfile.mkdtemp())
    store = work / "acts"
    bsc = [sys.executable, "-m", "bsc", "cache", "--model", "demo", "--store", str(store)]
    subprocess.run([*bsc, "--tokens", arguments.tokens, "--hookpoints", "layers.3.mlp"], check=True)
    rates: dict[str, list[float]] = {"one": [], "two": []}
    figures = {}
    for _ in range(arguments.repeats):
        for name, processes in (("one", 1), ("two", 2)):
            run = train(store, work, name, processes, arguments.batch_rows, arguments.latents)
            rates[name].append(rate(run))
            figures[name] = last(run)
    tensors = Run(work / "runs/one").coder(Run(work / "runs/one").coder_names()[0]).tensors
    sizes = [t.numel() for t in tensors.values()]
    (work / "sum.py").write_text(SUM)
    summed = json.loads(start([str(work / "sum.py"), json.dumps(sizes)], 2).splitlines()[-1])
    step = {n: [arguments.batch_rows / r for r in found] for n, found in rates.items()}
    slower = [two - one for one, two in zip(step["one"], step["two"], strict=True)]
    result = {
        "rows_per_second": {n: spread(found) for n, found in rates.items()},
        "two_over_one": ratio(rates["two"], rates["one"]),
        "seconds_of_a_step": {n: spread(found) for n, found in step.items()},
        "slower_by_seconds": spread(slower), "sum_of_gradients_seconds": round(summed, 4),
        "values_summed": sum(sizes), "figures": figures,
        "fvu_two_over_one": round(figures["two"]["fvu"] / figures["one"]["fvu"], 5),
        "within": statistics.median(slower) <= summed,
    }  # fmt: skip
    shutil.rmtree(work)
    facts = {
        "benchmark": "team", "batch_rows": arguments.batch_rows, "latents": arguments.latents,
        "result": result, "machine": machine(torch.device("cpu")), "cores": os.cpu_count(),
        "at": time.strftime("%Y-%m-%d %H:%M"), "system": platform.platform(),
        "versions": versions(),
    }  # fmt: skip
    print(json.dumps(facts))


if __name__ == "__main__":
    main()

"""A training step beside other work on the same cores, by how long OpenMP's threads spin.

    python benchmarks/bench_contention.py [--rounds 3] [--out PATH]

Runs the step of bench_train.py in processes of their own, in turn over the settings of
GOMP_SPINCOUNT, with nothing beside it, with one busy process, and with another process of torch.
Prints the medians over rounds as JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

SPINS = ("default", "100000", "10000", "1000")
LOADS = {
    "nothing": "",
    "a busy process": "while True: pass",
    "another torch": "import torch\na = torch.randn(1500, 1500)\n"
    "while True:\n    a @ a\n    [a[:300] + 1 for _ in range(50)]",
}
STEP = ["--parts", "step", "--quick", "--repeats", "3"]


def measured(spins: str) -> dict[str, float]:
    """Median milliseconds of the product and of the steps."""
    environment = {k: v for k, v in os.environ.items() if k != "GOMP_SPINCOUNT"}
    if spins != "default":
        environment["GOMP_SPINCOUNT"] = spins
    script = Path(__file__).with_name("bench_train.py")
    done = subprocess.run(
        [sys.executable, str(script), *STEP], env=environment, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    result = json.loads(done.stdout.splitlines()[-1])["results"]["step"][0]
    return {n: result[f"{n}_ms"]["median"] for n in ("gemm", "eager", "compiled")}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    found: dict[str, dict[str, list[dict[str, float]]]] = {}
    for _ in range(arguments.rounds):
        for load, code in LOADS.items():
            for spins in SPINS:
                beside = subprocess.Popen([sys.executable, "-c", code]) if code else None
                try:
                    line = measured(spins)
                finally:
                    if beside:
                        beside.kill()
                        beside.wait()
                print(load, spins, line, file=sys.stderr)
                found.setdefault(load, {}).setdefault(spins, []).append(line)
    medians: dict[str, Any] = {
        load: {
            spins: {
                name: {
                    "median": statistics.median(line[name] for line in lines),
                    "min": min(line[name] for line in lines),
                    "max": max(line[name] for line in lines),
                }
                for name in lines[0]
            }
            for spins, lines in by_spins.items()
        }
        for load, by_spins in found.items()
    }
    text = json.dumps({"benchmark": "contention", "cpus": os.cpu_count(), "results": medians})
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n")


if __name__ == "__main__":
    main()

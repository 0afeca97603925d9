"""What products of bfloat16 take on this CPU, over those of float32.

    python -m benchmarks.bench_bfloat16 [--repeats 5] [--json PATH]

The products of a language model and of a coder, in turn: rows times a transposed weight (as a
linear layer takes them), rows times a weight as it lies, and a training step of a bank with
products in either type. Says whether bsc takes them in bfloat16 here (`multiplies_bfloat16`).
Prints medians and spreads; the last line is JSON.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.measure import alternate, machine, ratio, spread
from bsc.devices import multiplies_bfloat16
from bsc.train.coders.bank import Bank
from bsc.train.coders.config import CoderConfig

ROWS, D, F, K = 2048, 192, 1536, 32
CPU = torch.device("cpu")


def products(kind: torch.dtype) -> dict[str, Callable[[], object]]:
    """Products of one type, by what they are."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn((ROWS, D), generator=generator).to(kind)
    weight = torch.randn((F, D), generator=generator).to(kind)
    lying = weight.T.contiguous()
    config = CoderConfig(code="continuous", k=K, n_latents=F, d_in=D, d_out=D)
    bank = Bank([config], total_variance=1.0, compute_dtype=kind)
    rows = torch.randn((ROWS, D), generator=generator)
    bank.initialise([0], torch.zeros(D), torch.zeros(D))
    return {
        "rows times a transposed weight": lambda: torch.nn.functional.linear(x, weight),
        "rows times a weight": lambda: x @ lying,
        "a training step": lambda: bank.step(rows, rows),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    kinds = {"bfloat16": products(torch.bfloat16), "float32": products(torch.float32)}
    found = {}
    for name in kinds["float32"]:
        runs = {kind: own[name] for kind, own in kinds.items()}
        ms = alternate(runs, CPU, arguments.repeats)
        both = {kind: spread(values) for kind, values in ms.items()}
        found[name] = both | {"ratio": ratio(ms["bfloat16"], ms["float32"])}
        print(
            f"{name:32} bfloat16 {both['bfloat16']['median']:8.2f} ms, float32 "
            f"{both['float32']['median']:8.2f} ms, ratio {found[name]['ratio']['median']:.1f}"
        )
    result = {
        "machine": machine(CPU),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "taken": multiplies_bfloat16(CPU),
        "results": found,
    }
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2))
    print(json.dumps(result))


if __name__ == "__main__":
    main()

"""Which learning rate is best, by optimiser, code, width, batch and number of steps?

Trains one coder per learning rate, all of a setting in one run on the same rows, and prints FVU
over the last tenth of the run: training rows before their update (in runs of more than one pass
they were seen before). The last line is JSON. The figures choose the defaults of
`bsc.train.schedule`; they are not test figures.

    python benchmarks/bench_step_size.py --store bsc-demo/acts [--settings base wide narrow ...]

The settings of 1,000 steps and more read a store of 6M rows once:

    bsc cache --model demo --text env --hookpoints layers.3.mlp --tokens 6M --store acts-6M
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bsc.train.config import TrainConfig
from bsc.train.trainer import train_sweep
from bsc.versions import versions

RATES = {
    "adam": [1e-3, 3e-3, 1e-2, 3e-2, 6e-2],
    "signum": [1e-3, 3e-3, 1e-2, 3e-2],
    "signum_classic": [3e-4, 1e-3, 3e-3, 1e-2],
    "muon": [3e-3, 1e-2, 3e-2, 1e-1],
}
TWO = ("adam", "signum")
BINARY = [2e-3, 4e-3, 8e-3, 1.6e-2, 3.27e-2]
SETTINGS: dict[str, dict[str, Any]] = {
    "base": {"n_latents": 1536, "batch_rows": 2048, "passes": 1, "optimisers": tuple(RATES)},
    "narrow": {"n_latents": 384, "batch_rows": 2048, "passes": 1, "optimisers": TWO},
    "wide": {"n_latents": 6144, "batch_rows": 2048, "passes": 1, "optimisers": TWO},
    "short": {"n_latents": 1536, "batch_rows": 8192, "passes": 1, "optimisers": TWO},
    "long": {"n_latents": 1536, "batch_rows": 2048, "passes": 4, "optimisers": TWO},
    "large batch": {"n_latents": 1536, "batch_rows": 8192, "passes": 4, "optimisers": TWO},
    "sae": {"n_latents": 1536, "batch_rows": 2048, "passes": 1, "optimisers": TWO, "site": "sae"},
    "1,000 steps": {"n_latents": 1536, "batch_rows": 2048, "rows": 2_048_000,
                    "optimisers": ("adam",), "rates": BINARY[:5], "codes": ("binary",)},
    "3,000 steps": {"n_latents": 1536, "batch_rows": 2048, "rows": 5_980_000,
                    "optimisers": ("adam",), "rates": BINARY[1:5], "codes": ("binary",)},
    "3,000 steps, continuous": {"n_latents": 1536, "batch_rows": 2048, "rows": 5_980_000,
                                "optimisers": ("adam",), "rates": [1.25e-3, 2.5e-3, 5e-3, 1e-2],
                                "codes": ("continuous",)},
    "3,000 steps, sae": {"n_latents": 1536, "batch_rows": 2048, "rows": 5_980_000, "site": "sae",
                         "optimisers": ("adam",), "rates": BINARY[1:5], "codes": ("binary",)},
    "12,000 steps": {"n_latents": 1536, "batch_rows": 512, "rows": 5_980_000,
                     "optimisers": ("adam",), "rates": [1e-3, *BINARY[:3]], "codes": ("binary",)},
}  # fmt: skip


def run_setting(store: Path, k: int, setting: dict[str, Any]) -> list[dict[str, Any]]:
    """Train a setting's grid; one line per coder."""
    rows = setting.get("rows") or setting["passes"] * 655_360
    codes = list(setting.get("codes", ("binary", "continuous")))
    with tempfile.TemporaryDirectory() as folder:
        run, summaries = train_sweep(
            TrainConfig(
                store=store,
                runs=Path(folder),
                batch_rows=setting["batch_rows"],
                tokens=rows,
                eval_every=0,
                keep_checkpoint=False,
                log_every=4,
                coders=tuple(
                    {"site": setting.get("site", "skip_transcoder"), "k": k, "optimiser": o,
                     "n_latents": setting["n_latents"], "code": codes,
                     "lr": setting.get("rates") or RATES[o]}
                    for o in setting["optimisers"]
                ),
            )
        )  # fmt: skip
        config, metrics = run.config(), list(run.metrics())
    assert config.completed is not None
    late = 0.9 * config.completed.rows
    frozen = {s.name: s.frozen_at for s in summaries}
    found = []
    for planned in config.planned:
        name = planned.name
        mine = [m for m in metrics if m["coder"] == name and m["rows"] > late]
        line: dict[str, Any] = {
            "optimiser": planned.optimiser, "code": planned.coder.code,
            "lr": planned.lr, "fvu": None, "l0": None,
        }  # fmt: skip
        if mine and frozen[name] is None:
            line["fvu"] = round(float(np.mean([m["fvu"] for m in mine])), 4)
            line["l0"] = round(float(np.mean([m["l0"] for m in mine])), 1)
        found.append(line)
    return found


def main() -> None:
    """Run the settings, print Markdown tables and one line of JSON."""
    usual = [name for name, setting in SETTINGS.items() if "passes" in setting]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--store", type=Path, default=Path("bsc-demo/acts"))
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=usual)
    parser.add_argument("--k", type=int, default=32)
    args = parser.parse_args()
    results = {}
    for name in args.settings:
        results[name] = run_setting(args.store, args.k, SETTINGS[name])
        print(f"\n{name}: {SETTINGS[name]}\n", file=sys.stderr)
        for line in results[name]:
            print(f"| {' | '.join(str(v) for v in line.values())} |", file=sys.stderr, flush=True)
    facts = {"k": args.k, "threads": torch.get_num_threads(), "versions": versions()}
    print(json.dumps({"benchmark": "step_size", "results": results} | facts))


if __name__ == "__main__":
    main()

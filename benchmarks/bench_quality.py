"""What do precision, optimiser, decoder norm and AuxK do to the coders of the embedded model?

* precision: bfloat16 training against float32 training, at equal tokens: held-out FVU.
* collapse: dead latents and FVU of binary SAEs, unit and free rows and learned amplitudes, by Adam
  and signum at the paper's learning rates and at the defaults, with and without AuxK.
* axes: the selections, codes and surrogates side by side.

Three seeds each, one pass over the training rows, figures on held-out rows after it. The last line
is JSON.

    python benchmarks/bench_quality.py --store bsc-demo/acts [--parts precision collapse axes]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from bsc.train.config import TrainConfig
from bsc.train.trainer import train_sweep
from bsc.versions import versions

SEEDS = [0, 1, 2]
BASE = {"n_latents": 1536, "k": 32, "seed": SEEDS}


def figures(store: Path, tables: list[dict[str, Any]], **fields: Any) -> list[dict[str, Any]]:
    """Train all tables in one run; for each its fields and its figures over the seeds."""
    tables = [BASE | t | {"group": f"t{i}"} for i, t in enumerate(tables)]
    with tempfile.TemporaryDirectory() as folder:
        values: dict[str, Any] = {
            "store": store, "runs": Path(folder), "coders": tuple(tables), "eval_rows": 32_768,
            "dead_after": 200_000, "keep_checkpoint": False,
        }  # fmt: skip
        run, summaries = train_sweep(TrainConfig(**values | fields))
        planned = {c.name: c for c in run.config().planned}
    found = []
    for i, table in enumerate(tables):
        mine = [s for s in summaries if planned[s.name].group == f"t{i}"]
        line: dict[str, Any] = {k: v for k, v in table.items() if k not in (*BASE, "group")}
        for key in ("held_out_fvu", "fvu", "l0", "dead"):
            known = [getattr(s, key) for s in mine if getattr(s, key) is not None]
            line[key] = [round(float(v), 5) for v in known]
        line["lr"] = planned[mine[0].name].lr
        line["not_finite"] = sum(s.frozen_at is not None for s in mine)
        print(line, file=sys.stderr, flush=True)
        found.append(line)
    return found


def bench_precision(store: Path) -> dict[str, Any]:
    """Held-out FVU of bfloat16 over float32 training, seed by seed."""
    tables = [{"code": code} for code in ("binary", "continuous")]
    narrow, wide = (figures(store, tables, precision=p) for p in ("bf16", "fp32"))
    found = {}
    for table, a, b in zip(tables, narrow, wide, strict=True):
        ratios = [x / y for x, y in zip(a["held_out_fvu"], b["held_out_fvu"], strict=True)]
        found[table["code"]] = {
            "bf16": a["held_out_fvu"], "fp32": b["held_out_fvu"],
            "ratios": [round(r, 5) for r in ratios],
            "mean_ratio": round(statistics.mean(ratios), 5),
        }  # fmt: skip
        print(table["code"], found[table["code"]], file=sys.stderr, flush=True)
    return found


def bench_collapse(store: Path) -> list[dict[str, Any]]:
    """Binary SAEs, whose latents die."""
    tables: list[dict[str, Any]] = [
        {"site": "sae", "code": "binary", "optimiser": o, "lr": lr, **norm}
        for norm in ({"decoder_norm": "unit", "amplitude": "none"},
                     {"decoder_norm": "free"},
                     {"decoder_norm": "unit", "amplitude": "learned"})
        for o in ("adam", "signum")
        for lr in ("paper", None)
    ]  # fmt: skip
    for table in tables:
        if table["lr"] is None:
            del table["lr"]
    tables += [
        {"site": "sae", "code": code, "decoder_norm": "free", "auxk_alpha": a}
        for code in ("binary", "continuous")
        for a in (0.0, 1 / 32, 1.0)
    ]
    return figures(store, tables)


def bench_axes(store: Path) -> list[dict[str, Any]]:
    """One skip transcoder of every kind."""
    tables: list[dict[str, Any]] = [
        {"code": code, "select": select}
        for code in ("continuous", "binary", "hybrid")
        for select in ("topk", "groupmax", "batch_topk")
    ]
    tables += [
        {"code": "binary", "surrogate": "identity"},
        {"code": "binary", "surrogate": "rectangle"},
        {"code": "binary", "surrogate": "gumbel", "select": "groupmax"},
        {"code": "binary", "exact_k": True},
        {"code": "binary", "threshold": "fixed"},
        {"code": "binary", "k_init": 128},
        {"code": "binary", "temperature_init": 4.0, "anneal": 0.5},
        {"code": "continuous", "multi_topk": True},
    ]
    return figures(store, tables)


PARTS = {"precision": bench_precision, "collapse": bench_collapse, "axes": bench_axes}


def main() -> None:
    """Run the parts and print one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--store", type=Path, default=Path("bsc-demo/acts"))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    args = parser.parse_args()
    results = {part: PARTS[part](args.store) for part in args.parts}
    facts = {"threads": torch.get_num_threads(), "versions": versions(), "base": BASE}
    print(json.dumps({"benchmark": "quality", "results": results} | facts))


if __name__ == "__main__":
    main()

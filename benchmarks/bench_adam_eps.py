"""What does Adam's epsilon do to a coder, beside a gradient of the size that it should have?

The gradient of an FVU to one entry of a decoder row is about sqrt(k / (F N)) / V where a latent's
rows disagree: N rows in a step, V the total variance. Epsilon is given here as a share of that, and
the learning rate as a multiple of the default. Prints held-out FVU, L0 and the share of dead
latents at the end; the last line is JSON. The figures are quality, not speed.

    python benchmarks/bench_adam_eps.py --store bsc-demo/acts [--settings base wide ...]
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from pathlib import Path
from typing import Any

from bsc.train.config import TrainConfig
from bsc.train.schedule import default_lr
from bsc.train.trainer import train_sweep
from bsc.versions import versions

ROWS = 655_360
SETTINGS: dict[str, dict[str, Any]] = {
    "base": {"k": (8, 32), "rates": (0.5, 1, 2),
             "shares": {8: (1e-6, 0.31, 1.2, 4.9), 32: (1e-6, 0.15, 0.6, 2.4)}},
    "wide": {"k": (32,), "n_latents": 6144},
    "large batch": {"k": (8, 32), "batch_rows": 8192},
    "sae": {"k": (8, 32), "site": "sae"},
    "long": {"k": (32,), "passes": 4},
}  # fmt: skip
SHARES = (1e-6, 0.6)


def run_setting(store: Path, width: int, setting: dict[str, Any]) -> list[dict[str, Any]]:
    """Train a setting's grid; one line per coder."""
    n_latents, batch = setting.get("n_latents", 1536), setting.get("batch_rows", 2048)
    tables = []
    for code in ("binary", "continuous"):
        for k in setting["k"]:
            expected = math.sqrt(k / (n_latents * batch)) / width
            tables.append(
                {"site": setting.get("site", "skip_transcoder"), "code": code, "k": k,
                 "n_latents": n_latents,
                 "adam_eps": [s * expected for s in setting.get("shares", {}).get(k, SHARES)],
                 "lr": [default_lr("adam", code, n_latents) * m
                        for m in setting.get("rates", (1, 2))]}
            )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        run, summaries = train_sweep(
            TrainConfig(
                store=store, runs=Path(folder), batch_rows=batch, dead_after=200_000,
                tokens=setting.get("passes", 1) * ROWS, keep_checkpoint=False, log_every=5,
                coders=tuple(tables),
            )
        )  # fmt: skip
        planned = {p.name: p for p in run.config().planned}
    found = []
    for s in summaries:
        p = planned[s.name]
        expected = math.sqrt(p.coder.k / (n_latents * batch)) / width
        found.append(
            {"code": p.coder.code, "k": p.coder.k, "share": round((p.adam_eps or 0) / expected, 7),
             "rate": round(p.lr / default_lr("adam", p.coder.code, n_latents), 3),
             "fvu": s.held_out_fvu, "l0": s.l0, "dead": s.dead}
        )  # fmt: skip
        print(found[-1], file=sys.stderr, flush=True)
    return found


def main() -> None:
    """Run the settings and print one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--width", type=int, default=192, help="channels of the output")
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=SETTINGS)
    given = parser.parse_args()
    results = {s: run_setting(given.store, given.width, SETTINGS[s]) for s in given.settings}
    print(json.dumps({"versions": versions(), "results": results}))


if __name__ == "__main__":
    main()

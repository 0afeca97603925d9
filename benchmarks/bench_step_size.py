"""Which learning rate is best for each code and optimiser, on one pass over a store?

Trains one coder per learning rate, all in one run on the same rows, and prints FVU over the last
tenth of the pass: rows that no coder had seen, before their update. The last line is JSON. The
figures choose the defaults of `bsc.train.optim.default_lr`; they are not test figures.

    python benchmarks/bench_step_size.py --store bsc-demo/acts
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
import torch

from bsc.train.sweep import TrainConfig
from bsc.train.trainer import train
from bsc.versions import versions

GRID = {
    ("adam", "continuous"): [1e-3, 3e-3, 1e-2, 3e-2],
    ("adam", "binary"): [3e-3, 1e-2, 3e-2, 6e-2],
    ("signum", "continuous"): [1e-3, 3e-3, 1e-2, 3e-2],
    ("signum", "binary"): [1e-3, 3e-3, 1e-2, 3e-2],
}


def main() -> None:
    """Run the sweep and print a Markdown table and one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--store", type=Path, default=Path("bsc-demo/acts"))
    parser.add_argument("--site", default="skip_transcoder")
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--n-latents", type=int, default=1536)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run, _ = train(
            TrainConfig(
                store=args.store,
                runs=Path(folder),
                coders=tuple(
                    {"site": args.site, "k": args.k, "n_latents": args.n_latents,
                     "optimiser": optimiser, "code": code, "lr": rates}
                    for (optimiser, code), rates in GRID.items()
                ),
            )
        )  # fmt: skip
        config, metrics = run.config(), list(run.metrics())
    late = 0.9 * config["completed"]["rows"]
    results = []
    print("| optimiser | code | learning rate | FVU, last tenth | L0 |\n|---|---|---|---|---|")
    for planned in config["coders"]:
        mine = [m for m in metrics if m["coder"] == planned["name"] and m["rows"] > late]
        fvu, l0 = (float(np.mean([m[key] for m in mine])) for key in ("fvu", "l0"))
        row = {"optimiser": planned["optimiser"], "code": planned["coder"]["code"],
               "lr": planned["lr"], "fvu": round(fvu, 4), "l0": round(l0, 1)}  # fmt: skip
        results.append(row)
        print(f"| {' | '.join(str(v) for v in row.values())} |")
    facts = {
        "store_id": config["store_id"], "rows": config["completed"]["rows"],
        "batch_rows": config["batch_rows"], "site": args.site, "k": args.k,
        "n_latents": args.n_latents, "threads": torch.get_num_threads(), "versions": versions(),
        "results": results,
    }  # fmt: skip
    print(json.dumps(facts))


if __name__ == "__main__":
    main()

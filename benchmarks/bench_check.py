"""What does it cost to compare shards with the manifest when they are first read?

On a store of random rows of width 576, from the page cache:

* hash: XXH3-128 of a mapped shard, over a copy of the same bytes in memory.
* loader: rows a second of the first pass over the store, both sides, with and without.
* training: seconds of a run that reads every shard for the first time, with and without: skip
  transcoders, four of 4,608 latents, two binary, batches of 2,048 rows, Adam.

Runs that are compared alternate; figures are medians with the smallest and the largest ratio. The
last line is JSON.

    python -m benchmarks.bench_check [--folder /tmp] [--rows 262144] [--repeats 5]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash

from benchmarks.bench_store import NAMES, blocks, write_store
from bsc.cache.store.layout import Grid
from bsc.cache.store.loader import Loader
from bsc.cache.store.store import ActivationStore
from bsc.train.config import TrainConfig
from bsc.train.trainer import train_sweep
from bsc.versions import versions

BATCH = 2_048


def hashing(root: Path) -> dict[str, float]:
    """Bytes a second of the hash and of a copy."""
    rows = ActivationStore(root, check=False).train.shard(NAMES[0], 0)
    raw = rows.reshape(-1).view(np.uint8)
    target = np.empty_like(raw)
    seconds: dict[str, list[float]] = {"hash": [], "copy": []}
    for _ in range(7):
        started = time.perf_counter()
        xxhash.xxh3_128_hexdigest(raw.data)
        seconds["hash"].append(time.perf_counter() - started)
        started = time.perf_counter()
        np.copyto(target, raw)
        seconds["copy"].append(time.perf_counter() - started)
    return {k: raw.nbytes / statistics.median(v) / 1e9 for k, v in seconds.items()}


def first_pass(root: Path, *, check: bool) -> float:
    """Seconds of the first pass of a loader over both sides."""
    split = ActivationStore(root, check=check).train
    loader = Loader(split, NAMES, batch_rows=BATCH, seed=0)
    started = time.perf_counter()
    rows = sum(len(x) for x, _ in islice(loader.batches(), split.rows // BATCH))
    assert rows == split.rows // BATCH * BATCH
    return time.perf_counter() - started


def training(root: Path, *, check: bool) -> float:
    """Seconds of the steps of a run over the whole store."""
    coders = ({"code": ["binary", "continuous"], "k": [32, 64], "n_latents": 4_608},)
    with tempfile.TemporaryDirectory() as runs:
        config = TrainConfig(
            store=root, runs=Path(runs), batch_rows=BATCH, coders=coders, eval_every=0,
            check=check, keep_checkpoint=False,
        )  # fmt: skip
        started = time.perf_counter()
        train_sweep(config)
        return time.perf_counter() - started


def ratios(repeats: int, work: Any, root: Path) -> dict[str, Any]:
    """Time with the check over time without, run by run."""
    found, seconds = [], []
    for i in range(repeats):
        order = (True, False) if i % 2 else (False, True)
        times = {check: work(root, check=check) for check in order}
        found.append(times[True] / times[False])
        seconds.append(times[False])
        print(f"{work.__name__}: {times}", file=sys.stderr, flush=True)
    return {
        "ratio": round(statistics.median(found), 4),
        "smallest": round(min(found), 4), "largest": round(max(found), 4),
        "seconds_without": round(statistics.median(seconds), 3),
    }  # fmt: skip


def main() -> None:
    """Run all parts and print one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--rows", type=int, default=262_144)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        root = Path(folder) / "acts"
        grid = Grid.for_rows(args.rows, min_shards=16)
        write_store(root, grid, blocks(4), 16)
        results = {
            "rows": grid.rows, "shards": grid.shards, "gigabytes_per_second": hashing(root),
            "loader": ratios(args.repeats, first_pass, root),
            "training": ratios(args.repeats, training, root),
        }  # fmt: skip
    facts = {"threads": torch.get_num_threads(), "versions": versions()}
    print(json.dumps({"benchmark": "check", "results": results} | facts))


if __name__ == "__main__":
    main()

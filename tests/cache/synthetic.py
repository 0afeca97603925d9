"""Stores of rows that say which row they are, written without a model."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bsc.cache.capture.commit import advance, complete, create, split_start
from bsc.cache.capture.staging import Staging
from bsc.cache.capture.writer import SplitPart, SplitWriter
from bsc.cache.store.folder import open_folder
from bsc.cache.store.kinds import Codec
from bsc.cache.store.layout import (
    Grid,
    Hookpoint,
    array_specs,
    group_json,
    store_attributes,
    store_id_of,
)
from bsc.cache.store.manifest import PartEnd, TextPoint, write_end
from bsc.cache.store.store import ActivationStore
from bsc.files import canonical_json
from bsc.records import sealed

GRID = Grid(96, 24, 10)
HOOKS = (Hookpoint("layers.0.mlp", 4, 6),)


def block(start: int, stop: int) -> dict[str, torch.Tensor]:
    """Rows whose every array says which row it is."""
    number = torch.arange(start, stop, dtype=torch.int32)
    low, high = (number % 128).bfloat16(), (number // 128).bfloat16()
    x = torch.stack([low, high, low, high], dim=1)
    return {
        "layers.0.mlp/input": x,
        "layers.0.mlp/output": torch.cat([x, -x[:, :2]], dim=1),
        "tokens/token_id": number,
        "tokens/doc_id": number // 10,
        "tokens/position": number % 10,
        "tokens/ngram": number.long() << 31,
    }


def identity_of(
    grid: Grid, *, window: int, writers: int = 1, codec: Codec = "raw", ring: int | None = None
) -> dict[str, object]:
    return {
        "model": {}, "context": 10, "packing": "joined", "seed": 3, "window": window,
        "grids": {"train": asdict(grid)},
        "hookpoints": [{"name": h.name, "d_in": h.d_in, "d_out": h.d_out} for h in HOOKS],
        "codec": codec, "writers": writers, "ring": ring,
    }  # fmt: skip


def make_store(
    root: Path,
    rows: int,
    grid: Grid,
    *,
    window: int,
    size: int = 37,
    codec: Codec = "raw",
    rank: int = 0,
    writers: int = 1,
    ring: int | None = None,
    first: int = 0,
    stop_after: int | None = None,
    before_window: Callable[[list[int]], bool] | None = None,
    edit: Callable[[dict[str, torch.Tensor]], None] = lambda b: None,
) -> int:
    """Write one writer's part, or go on with it; rows dropped at its end.

    `first` is the writer's first row number; with `stop_after` rows the writer is abandoned, as a
    process that dies is.
    """
    folder = open_folder(root)
    identity = identity_of(grid, window=window, writers=writers, codec=codec, ring=ring)
    specs = array_specs(HOOKS, "train", codec)
    scales = {f"layers.0.mlp/{s}": np.ones(n, np.float32) for s, n in (("input", 4), ("output", 6))}
    arrays = {"train": (specs, grid)}
    create(
        folder, arrays, store_attributes(identity),  # type: ignore[arg-type]
        {"capture": identity, "store_id": store_id_of(identity)},
        {n: {"channel_scale": s.tolist()} for n, s in scales.items()} if codec == "int8" else {},
    )  # fmt: skip
    start = split_start(folder, "train", grid, rank, writers, window)
    staging = Staging(len(specs), torch.device("cpu"))
    writer = SplitWriter(
        folder, SplitPart("train", specs, grid, rank, writers, window, seed=3), staging,
        channel_scales=scales if codec == "int8" else {}, start=start, before_window=before_window,
        on_commit=lambda: advance(folder, "train", specs, grid, writers=writers, window=window),
    )  # fmt: skip
    try:
        for at in range(start.point.rows, rows, size):
            if stop_after is not None and at >= stop_after:
                writer.finalise(wait=True)
                return 0
            made = block(first + at, first + min(at + size, rows))
            edit(made)
            skip = start.point.skip if at == start.point.rows else 0
            writer.append(made, TextPoint(rows=at, skip=skip))
        dropped = writer.finish(rows)
    finally:
        staging.close()
        writer.abort()
    write_end(folder, PartEnd(rank, {"train": writer.committed_rows}, {"train": dropped}, False))
    complete(folder, arrays, {"train": window}, writers=writers)  # type: ignore[arg-type]
    return dropped


def numbers(store: ActivationStore, *, exact: bool = True) -> np.ndarray:
    """Row numbers as the token array has them, checked against every other array."""
    split = store.train
    ids = split.tokens("token_id").astype(np.int64)
    assert np.array_equal(split.tokens("doc_id"), ids // 10)
    assert np.array_equal(split.tokens("position"), ids % 10)
    assert np.array_equal(split.tokens("ngram").astype(np.int64), ids << 31)
    if exact:
        x = torch.cat([split.tensor("layers.0.mlp/input", i) for i in range(split.shards)]).float()
        y = torch.cat([split.tensor("layers.0.mlp/output", i) for i in range(split.shards)]).float()
        assert np.array_equal((x[:, 0] + 128 * x[:, 1]).numpy(), ids)
        assert np.array_equal((-y[:, 4] - 128 * y[:, 5]).numpy(), ids)
    return ids


def files_of(root: Path) -> dict[str, bytes]:
    """Every file of a store but for the times in its provenance."""
    return {
        p.relative_to(root).as_posix(): p.read_bytes()
        for p in root.rglob("*")
        if p.is_file() and p.name != "provenance.json"
    }


def change_capture(store: Path, **changes: Any) -> str:
    """Say in all that says so that a store was captured otherwise; its new id."""
    provenance = store / "provenance.json"
    made = json.loads(provenance.read_text())
    made["capture"] |= changes
    made["store_id"] = store_id_of(made["capture"])
    provenance.write_bytes(sealed(made))
    group = group_json({"activation_store": store_attributes(made["capture"])})
    (store / "data.zarr/zarr.json").write_text(canonical_json(group))
    return str(made["store_id"])

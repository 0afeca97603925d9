"""Writing a store: rows are scattered over open shards, shards committed in order, never changed.

Commit of shard k, all arrays of a split together: every file under its final name and durable,
then the manifest lines (append, fsync), then `shape` in the metadata of every array, with the
channel sums so far in its attributes. `shape` is the commit pointer: a reader that takes the
smallest one of a split never meets a row that is not there.

Scatter: a window is a set of up to W shards that are open at once. Each block of rows is permuted
by a counter-based generator, keyed by (seed, window) and counted by block, and dealt to the shards
of the window in turn, so that they fill at the same pace and the same block always lands in the
same place. Every array gets the same permutation.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bsc.cache.layout import (
    DATA,
    MANIFEST,
    PROVENANCE,
    SPLITS,
    ArraySpec,
    Grid,
    Hookpoint,
    Split,
    array_specs,
    group_json,
    shard_path,
)
from bsc.cache.readme import STORE_README
from bsc.cache.shard import ChannelSums, ShardWriter
from bsc.files import (
    canonical_json,
    fsync_folder,
    make_durable_folder,
    write_atomically,
    write_json,
)

__all__ = ["SplitWriter", "StoreWriter", "deal", "window_sizes"]

Block = Mapping[str, torch.Tensor]
"""Rows by array name, ``"layers.3.mlp/input"``: (n, width) bfloat16 or (n,) integers."""


def window_sizes(shards: int, window: int) -> list[int]:
    """Numbers of shards of the windows: at most `window` each, as equal as they can be.

    >>> window_sizes(66, 64)
    [33, 33]
    """
    n = -(-shards // window)
    return [shards * (i + 1) // n - shards * i // n for i in range(n)]


def deal(
    rows: int, shards: int, first: int, *, seed: int, window: int, block: int
) -> list[NDArray[np.int64]]:
    """Which rows of a block go to which open shard: a permutation, dealt in turn.

    Args:
        rows: rows in the block.
        shards: open shards.
        first: shard that gets the first permuted row.
        seed: of the store.
        window: number of the window.
        block: number of the block within the window.

    Returns:
        For each open shard the indices of its rows, in the order in which they are appended.

    >>> dealt = deal(5, 2, 1, seed=0, window=0, block=0)
    >>> [len(d) for d in dealt], sorted(int(i) for d in dealt for i in d)
    ([2, 3], [0, 1, 2, 3, 4])
    """
    philox = np.random.Philox(key=[seed, window], counter=[0, 0, 0, block])
    order = np.random.Generator(philox).permutation(rows)
    return [order[(s - first) % shards :: shards] for s in range(shards)]


class SplitWriter:
    """The shards of one split. Rows go in as blocks; committed shards come out in order."""

    def __init__(
        self,
        root: Path,
        split: Split,
        hookpoints: tuple[Hookpoint, ...],
        grid: Grid,
        *,
        window: int,
        seed: int,
    ) -> None:
        """Start a split with no rows.

        Args:
            root: the store's folder.
            split: which split.
            hookpoints: what it holds.
            grid: its division into shards.
            window: number of shards to scatter over; 1 keeps the order of the rows.
            seed: of the scatter.
        """
        self.root, self.grid, self.seed, self.scatter = root, grid, seed, window > 1
        self.specs = array_specs(hookpoints, split)
        self.rows = 0
        """Rows taken, committed or not."""
        self.committed = 0
        """Committed shards."""
        self.bytes = 0
        """Bytes of committed shards."""
        self._windows = window_sizes(grid.shards, window)
        self._window = 0
        self._block = 0
        self._open: list[dict[str, ShardWriter]] = []
        self._sums = {n: ChannelSums(s.width) for n, s in self.specs.items() if s.width is not None}
        for name in self.specs:
            self._write_metadata(name)

    @property
    def full(self) -> bool:
        """Whether every row that the grid has room for is there."""
        return self.rows == self.grid.rows

    def _write_metadata(self, name: str) -> None:
        spec: ArraySpec = self.specs[name]
        folder = self.root / DATA / spec.path
        make_durable_folder(folder)
        attributes = self._sums[name].to_json() if name in self._sums else {}
        rows = self.committed * self.grid.shard_rows
        write_json(folder / "zarr.json", spec.zarr_json(rows, self.grid, attributes))

    def append(self, block: Block) -> int:
        """Take the rows of a block; all arrays of the split, the same number of rows each.

        Returns:
            Rows taken: fewer than were given only when the split is full.

        Raises:
            OSError: the disk is full or fails. What is committed stays.
        """
        assert set(block) == set(self.specs)
        given = len(next(iter(block.values())))
        taken = 0
        while taken < given and not self.full:
            if not self._open:
                self._open_window()
            left = sum(shard["tokens/token_id"].free_rows for shard in self._open)
            n = min(given - taken, left)
            self._append_to_window({k: v[taken : taken + n] for k, v in block.items()}, n)
            taken += n
            self.rows += n
            if n == left:
                self._commit_window(len(self._open))
        return taken

    def _open_window(self) -> None:
        for shard in range(self.committed, self.committed + self._windows[self._window]):
            writers: dict[str, ShardWriter] = {}
            self._open.append(writers)  # first, so that a failure leaves none behind
            for name, spec in self.specs.items():
                writers[name] = ShardWriter(shard_path(self.root, spec, shard), spec, self.grid)
        self._block = 0

    def _append_to_window(self, block: Block, rows: int) -> None:
        n_open = len(self._open)
        if self.scatter:
            first = sum(shard["tokens/token_id"].rows for shard in self._open) % n_open
            dealt = deal(
                rows, n_open, first, seed=self.seed, window=self._window, block=self._block
            )
            order = torch.from_numpy(np.concatenate(dealt))
            bounds = np.cumsum([0, *(len(d) for d in dealt)])
        else:
            order, bounds = None, np.array([0, rows])
        self._block += 1
        for name, values in block.items():
            spec = self.specs[name]
            # One gather and one copy to the host per array: its segments are then contiguous.
            ordered = values if order is None else values.index_select(0, order.to(values.device))
            host = ordered.cpu().contiguous()
            raw = host.view(torch.int16) if spec.dtype == "bfloat16" else host.to(torch.int32)
            array = raw.numpy().view(spec.numpy_dtype)
            for shard, start, stop in zip(self._open, bounds[:-1], bounds[1:], strict=True):
                shard[name].append(array[start:stop])

    def _commit_window(self, full_shards: int) -> None:
        for shard in self._open[:full_shards]:
            number = self.committed
            records = {n: w.commit(number, self._window) for n, w in shard.items()}
            with (self.root / MANIFEST).open("a") as manifest:
                for record in records.values():
                    manifest.write(canonical_json(record.to_json(), indent=None))
                manifest.flush()
                os.fsync(manifest.fileno())
            self.committed += 1
            for name, record in records.items():
                self.bytes += record.bytes
                if record.sums is not None:
                    self._sums[name].merge(record.sums)
                self._write_metadata(name)
        for shard in self._open[full_shards:]:
            for writer in shard.values():
                writer.abort()
        self._open = []
        self._window += 1

    def finish(self) -> int:
        """Commit what an ended text left in open shards, as far as it fills whole ones.

        The rows of a window are dealt at random, so those of the last shards can complete the
        first ones and the result is as well mixed as a full window.

        Returns:
            Rows that filled no shard and were dropped, fewer than one shard.
        """
        if not self._open:
            return 0
        held = sum(shard["tokens/token_id"].rows for shard in self._open)
        full_shards = held // self.grid.shard_rows
        for name in self.specs:
            writers = [shard[name] for shard in self._open]
            to_fill = writers[:full_shards]
            for donor in writers[full_shards:] if full_shards else []:
                rows = donor.rows_so_far()
                while len(rows) and to_fill:
                    n = min(len(rows), to_fill[0].free_rows)
                    to_fill[0].append(rows[:n])
                    rows = rows[n:]
                    if to_fill[0].free_rows == 0:
                        to_fill.pop(0)
        dropped = held - full_shards * self.grid.shard_rows
        self.rows -= dropped
        self._commit_window(full_shards)
        return dropped

    def abort(self) -> None:
        """Drop the open shards; what is committed stays."""
        for shard in self._open:
            for writer in shard.values():
                writer.abort()
        self._open = []


class StoreWriter:
    """A store that is being written: its folder, its metadata and its two splits."""

    def __init__(
        self,
        root: Path,
        hookpoints: tuple[Hookpoint, ...],
        grids: Mapping[Split, Grid],
        *,
        window: int,
        seed: int,
        attributes: Mapping[str, Any],
        provenance: Mapping[str, Any],
    ) -> None:
        """Lay out an empty store in `root`, a folder that is there and empty.

        Args:
            root: the store's folder.
            hookpoints: what the store holds.
            grids: the division of each split into shards; no entry, no such split.
            window: shards that the training split is scattered over at a time.
            seed: of the scatter.
            attributes: what readers need, for the root group of data.zarr.
            provenance: how the store was made, for provenance.json.
        """
        self.root = root
        data = root / DATA
        data.mkdir(parents=True)
        (root / MANIFEST).touch()
        write_json(root / PROVENANCE, dict(provenance))
        write_atomically(root / "README.md", STORE_README)
        write_json(data / "zarr.json", group_json({"activation_store": dict(attributes)}))
        self.splits: dict[Split, SplitWriter] = {}
        for split in SPLITS:
            if split not in grids:
                continue
            for spec in array_specs(hookpoints, split).values():
                for parent in list(Path(spec.path).parents)[:-1]:
                    folder = data / parent
                    make_durable_folder(folder)
                    if not (folder / "zarr.json").exists():
                        write_json(folder / "zarr.json", group_json({}))
            self.splits[split] = SplitWriter(
                root,
                split,
                hookpoints,
                grids[split],
                window=window if split == "train" else 1,
                seed=seed,
            )
        fsync_folder(root)

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for split in self.splits.values():
            split.abort()

    def complete(self, facts: Mapping[str, Any]) -> None:
        """Add the end of the story to provenance.json: the store is finished."""
        path = self.root / PROVENANCE
        write_json(path, json.loads(path.read_text()) | {"completed": dict(facts)})

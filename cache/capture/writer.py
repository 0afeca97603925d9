"""Writing the rows of a store: scattered over open shards, committed by window, never changed.

Commit of a window: every shard of every array under its name and durable, then the manifest of the
window, then `shape` in the metadata of every array (capture/commit.py). A window is committed or it
is not; a killed capture goes on at the first one that is not.

Scatter: a window is a set of up to W shards that are open at once. Each block of rows is permuted
by a counter-based generator, keyed by seed, writer and window and counted by block, and dealt to
the shards of the window in turn. Every array gets the same permutation.

Writer r of R owns the shards r, r + R, r + 2R, ... of each split.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from bsc.cache.capture.staging import Slot, Staging
from bsc.cache.store.channel_sums import ChannelSums
from bsc.cache.store.codec import dequantised, quantise
from bsc.cache.store.folder import StoreFolder
from bsc.cache.store.kinds import Split
from bsc.cache.store.layout import ROW_SCALE, ArraySpec, Grid, shard_key
from bsc.cache.store.manifest import TextPoint, WindowRecord, write_window
from bsc.cache.store.scatter import deal, owned_shards, window_sizes
from bsc.cache.store.shard import ShardRecord, ShardWriter

__all__ = ["SplitPart", "SplitStart", "SplitWriter"]

Block = Mapping[str, torch.Tensor]
"""Rows by array name, ``"layers.3.mlp/input"``: (n, width) bfloat16 or (n,) integers."""


class _OpenShard:
    """One shard of one array: its file, or with int8 the files of values and row scales."""

    def __init__(self, folder: StoreFolder, specs: list[ArraySpec], grid: Grid, shard: int) -> None:
        self.files: list[ShardWriter] = []
        for spec in specs:
            self.files.append(ShardWriter(folder, spec, grid, shard))
        width = specs[0].width
        self.sums = ChannelSums(width) if width is not None else None

    @property
    def rows(self) -> int:
        return self.files[0].rows

    @property
    def free_rows(self) -> int:
        return self.files[0].free_rows

    def append(self, parts: list[NDArray[Any]]) -> None:
        for file, rows in zip(self.files, parts, strict=True):
            file.append(rows)

    def commit(self, window: int) -> list[ShardRecord]:
        first, *others = self.files
        return [first.commit(window, self.sums), *(f.commit(window, None) for f in others)]


class _ArrayWriter:
    """One array of a split. Every method runs on one thread, in the order of the calls."""

    def __init__(
        self,
        folder: StoreFolder,
        specs: list[ArraySpec],
        grid: Grid,
        channel_scale: NDArray[np.float32] | None,
    ) -> None:
        self.folder, self.specs, self.grid = folder, specs, grid
        self.channel_scale = channel_scale
        self.shards: list[_OpenShard] = []
        self.bad_rows = 0
        """Rows with values that are not finite, in this process."""

    def open(self, shards: list[int]) -> None:
        for shard in shards:
            self.shards.append(_OpenShard(self.folder, self.specs, self.grid, shard))

    def append(self, slot: Slot, rows: torch.Tensor, bounds: NDArray[np.int64]) -> None:
        """Write rows that are sorted by shard: those of shard i lie between bounds i and i + 1."""
        slot.wait()
        if rows.dtype == torch.bfloat16:
            raw = rows.view(torch.int16).numpy().view("bfloat16")
        else:
            raw = rows.numpy().view(f"u{rows.dtype.itemsize}")
        for shard, start, stop in zip(self.shards, bounds[:-1], bounds[1:], strict=True):
            if stop > start:
                self._append_to(shard, raw[start:stop])

    def _append_to(self, shard: _OpenShard, rows: NDArray[Any]) -> None:
        parts, stored = [rows], None
        if self.channel_scale is not None:
            q, scale = quantise(rows, self.channel_scale)
            parts, stored = [q, scale], dequantised(q, scale, self.channel_scale)
        shard.append(parts)
        if shard.sums is not None:
            before = shard.sums.non_finite_rows
            shard.sums.add(rows, stored)
            self.bad_rows += shard.sums.non_finite_rows - before

    def complete(self, full: int) -> None:
        """Fill the first `full` shards with the rows of the others.

        The rows of a window are dealt at random, so those of the last shards can complete the
        first ones and the result is as well mixed as a full window. What is moved is moved as it is
        stored.
        """
        to_fill = self.shards[:full]
        for donor in self.shards[full:] if full else []:
            parts = [file.rows_so_far() for file in donor.files]
            while len(parts[0]) and to_fill:
                n = min(len(parts[0]), to_fill[0].free_rows)
                moved = [part[:n] for part in parts]
                to_fill[0].append(moved)
                if to_fill[0].sums is not None:
                    rows = moved[0]
                    if self.channel_scale is not None:
                        rows = dequantised(moved[0], moved[1], self.channel_scale)
                    to_fill[0].sums.add(rows)
                parts = [part[n:] for part in parts]
                if to_fill[0].free_rows == 0:
                    to_fill.pop(0)

    def commit(self, full: int, window: int) -> list[ShardRecord]:
        records = [record for shard in self.shards[:full] for record in shard.commit(window)]
        self.shards = self.shards[full:]
        self.abort()
        return records

    def abort(self) -> None:
        for shard in self.shards:
            for file in shard.files:
                file.abort()
        self.shards = []


@dataclass(frozen=True)
class SplitStart:
    """What one writer has committed of a split."""

    windows: int = 0
    shards: int = 0
    point: TextPoint = field(default_factory=TextPoint)
    """Where in the text the next window begins."""
    dropped: int = 0
    """Rows at the end of the text that filled no shard; known once the text has ended."""


class SplitPart(NamedTuple):
    """What of a split one writer writes."""

    split: Split
    specs: Mapping[str, ArraySpec]
    grid: Grid
    """Its division into shards, over all writers."""
    rank: int = 0
    """Number of this writer."""
    writers: int = 1
    window: int = 1
    """Shards to scatter over; 1 keeps the order of the rows."""
    seed: int = 0
    """Seed of the scatter."""


class SplitWriter:
    """The shards of one split that one writer owns. Blocks go in, committed windows come out."""

    def __init__(
        self,
        folder: StoreFolder,
        part: SplitPart,
        staging: Staging,
        *,
        channel_scales: Mapping[str, NDArray[np.float32]] | None = None,
        start: SplitStart | None = None,
        on_commit: Callable[[], object] = lambda: None,
        before_window: Callable[[list[int]], bool] | None = None,
    ) -> None:
        """Go on with a split after its committed windows.

        Args:
            folder: the store.
            part: what of it this writer writes.
            staging: buffers and threads, shared by the splits of a store.
            channel_scales: by array name, for codec int8.
            start: what is committed already; None: nothing.
            on_commit: called after a window's manifest is there.
            before_window: called with the shards of a window before it is opened; may wait, and
                says whether to go on. If not, this writer has room for no more rows.
        """
        split, specs, grid, rank, writers, window, seed = part
        self.folder, self.split, self.grid, self.staging = folder, split, grid, staging
        self.seed, self.rank, self.scatter = seed, rank, window > 1
        owned = owned_shards(grid.shards, rank, writers)
        sizes = window_sizes(len(owned), window) if len(owned) else []
        ends = np.cumsum([0, *sizes])
        self._windows = [list(owned[a:b]) for a, b in pairwise(ends)]
        start = start or SplitStart()
        self.window = start.windows
        self.committed_rows = start.shards * grid.shard_rows
        self.owned_rows = len(owned) * grid.shard_rows
        """Rows of this writer once every shard is there."""
        self.cut_short = False
        """Whether nobody would get to read the windows that are left."""
        self.rows = self.committed_rows
        """Rows taken, committed or not."""
        self.dropped = start.dropped
        """Rows at the end of the text that filled no shard, fewer than one shard."""
        self.bytes = 0
        """Bytes of the shards that this process committed."""
        self._on_commit, self._before_window = on_commit, before_window
        self._specs = list(specs.values())
        scales = channel_scales or {}
        self._arrays = {
            name: _ArrayWriter(
                folder,
                [spec, *(specs[n] for n in (name + ROW_SCALE,) if n in specs)],
                grid,
                scales.get(name),
            )
            for name, spec in specs.items()
            if not name.endswith(ROW_SCALE)
        }
        self._open = 0
        self._in_window = 0
        self._block = 0
        self._pending: tuple[int, TextPoint, list[Future[list[ShardRecord]]]] | None = None

    @property
    def full(self) -> bool:
        """Whether every row that this writer has room for is there."""
        return self.rows == self.owned_rows

    @property
    def bad_rows(self) -> dict[str, int]:
        """By array: rows with values that are not finite that this process has seen."""
        return {name: array.bad_rows for name, array in self._arrays.items()}

    def _on_arrays(self, work: Callable[[_ArrayWriter], Any]) -> list[Future[Any]]:
        return self.staging.submit([partial(work, array) for array in self._arrays.values()])

    def append(self, block: Block, point: TextPoint) -> int:
        """Take the rows of a block; all arrays of the split, the same number of rows each.

        Args:
            block: the rows of one batch of the model.
            point: where the batch begins; its first `point.skip` rows are left out.

        Returns:
            Rows taken: fewer than were given only when the split is full.

        Raises:
            OSError: the disk is full or fails. What is committed stays.
        """
        assert set(block) == set(self._arrays)
        self.finalise(wait=False)
        given = len(next(iter(block.values())))
        done = point.skip
        while done < given and not self.full:
            if not self._open and not self._open_window():
                self.owned_rows, self.cut_short = self.rows, True
                break
            left = self._open * self.grid.shard_rows - self._in_window
            n = min(given - done, left)
            self._append_to_window({k: v[done : done + n] for k, v in block.items()}, n)
            done += n
            self.rows += n
            self._in_window += n
            if n == left:
                self._commit_window(
                    self._open, TextPoint(point.document, point.offset, point.rows, done)
                )
        return done - point.skip

    def _open_window(self) -> bool:
        """Begin the next window; False if nobody would get to read it."""
        shards = self._windows[self.window]
        if self._before_window is not None:
            # What it waits for are readers, who may wait for the window before this one.
            self.finalise(wait=True)
            if not self._before_window(shards):
                return False
        self._on_arrays(lambda array: array.open(shards))
        self._open = len(shards)
        self._in_window = self._block = 0
        return True

    def _append_to_window(self, block: Block, rows: int) -> None:
        if self.scatter:
            first = self._in_window % self._open
            dealt = deal(
                rows,
                self._open,
                first,
                seed=self.seed,
                rank=self.rank,
                window=self.window,
                block=self._block,
            )
            order = torch.from_numpy(np.concatenate(dealt))
            bounds = np.cumsum([0, *(len(d) for d in dealt)])
        else:
            order, bounds = None, np.array([0, rows])
        self._block += 1
        slot = self.staging.slot()
        filled = {name: slot.fill(name, values, order) for name, values in block.items()}
        slot.filled()
        writes = [partial(a.append, slot, filled[n], bounds) for n, a in self._arrays.items()]
        self.staging.submit(writes, slot)

    def _commit_window(self, full: int, point: TextPoint) -> None:
        """Queue the commit; its manifest follows when every array is through."""
        self.finalise(wait=True)  # one window at a time
        window = self.window
        futures = self._on_arrays(lambda array: array.commit(full, window))
        self._pending = (full, point, futures)
        self.window += 1
        self._open = 0

    def finalise(self, *, wait: bool) -> None:
        """Write the manifest of a window whose shards are all published.

        Args:
            wait: until they are; otherwise nothing is done before.
        """
        self.staging.check()
        if self._pending is None:
            return
        full, point, futures = self._pending
        if not wait and not all(future.done() for future in futures):
            return
        records = [record for future in futures for record in future.result()]
        self._pending = None
        if full:
            window = self.window - 1
            record = WindowRecord(
                self.split, self.rank, window, point, tuple(records), self.dropped
            )
            write_window(self.folder, record)
            self.committed_rows += full * self.grid.shard_rows
            self.bytes += sum(record.bytes for record in records)
            self._on_commit()

    def finish(self, document: int) -> int:
        """Commit what an ended text left in open shards, as far as it fills whole ones.

        Args:
            document: number after the last document.

        Returns:
            Rows that filled no shard and were dropped, fewer than one shard.
        """
        self.finalise(wait=True)
        if self._open:
            full, self.dropped = divmod(self._in_window, self.grid.shard_rows)
            end = TextPoint(document, 0, self.rows, 0)
            self._on_arrays(lambda array: array.complete(full))
            self._commit_window(full, end)
            self.finalise(wait=True)
            self.rows -= self.dropped
        # What a process left open that was killed after the last window was committed.
        for window in self._windows[max(0, self.window - 1) : self.window + 1]:
            for shard in window:
                for spec in self._specs:
                    self.folder.discard(shard_key(spec, shard))
        return self.dropped

    def abort(self) -> None:
        """Drop the open shards, once the threads have ended; what is committed stays."""
        for array in self._arrays.values():
            array.abort()

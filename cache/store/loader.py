"""Random batches of a store's training rows, read in large sequential pieces.

Per epoch the shards are put in a random order and taken `shards_at_once` at a time; the rows of
their union come in random order. A store whose rows were scattered when they were written gives
batches whose mean varies hardly more than that of independent rows (docs/format.md, Shuffle).

While one group of shards is used a thread reads the next one from the disk. The order is a pure
function of (seed, epoch, group): a cursor of three integers resumes it at once.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from bsc.cache.store.kept import kept_rows
from bsc.cache.store.ring_room import SHARDS_AT_ONCE
from bsc.cache.store.shard_rows import ShardRows
from bsc.cache.store.split import StoreSplit
from bsc.errors import ConfigError
from bsc.prefetch import prefetched

__all__ = ["SHARDS_AT_ONCE", "START", "Cursor", "Group", "Loader", "shard_order"]

_POLL_SECONDS = 0.1


def shard_order(seed: int, epoch: int, shards: int) -> list[int]:
    """The order of all shards in an epoch."""
    rng = np.random.Generator(np.random.Philox(key=[seed, epoch]))
    order: list[int] = rng.permutation(shards).tolist()
    return order


class Cursor(NamedTuple):
    """Where a loader is: enough to go on from there."""

    epoch: int
    group: int
    """Group of shards, in the order of the epoch."""
    row: int
    """Rows of the group that were given already."""


START = Cursor(0, 0, 0)


class Group(NamedTuple):
    """Shards that are open together, and the order of the rows of their union."""

    number: int
    shards: list[int]
    rows: dict[str, dict[int, ShardRows]]
    """By array and number of the shard in the group; those that are needed."""
    order: NDArray[np.int32]
    """(n,): rows of the union, counted through its shards, batch by batch. Which rows are in a
    batch is random; within a batch they stand as in the files, which is faster to copy."""
    skip: int
    """Rows of the order that were given before."""


class Loader:
    """Batches of rows of several arrays, the same rows of each."""

    def __init__(
        self,
        split: StoreSplit,
        names: tuple[str, ...],
        *,
        batch_rows: int,
        seed: int,
        shards_at_once: int = SHARDS_AT_ONCE,
        without_tokens: Collection[int] = (),
        pinned: bool = False,
        ahead: int = 0,
        drop_last: bool = True,
        shards: Collection[int] | None = None,
        shuffle: bool = True,
        part: range | None = None,
    ) -> None:
        """Prepare to read; opens no shard.

        Args:
            split: rows to read.
            names: activation arrays, for example ``("layers.3.mlp/input",)``.
            batch_rows: rows in a batch.
            seed: of the order.
            shards_at_once: shards whose rows are mixed.
            without_tokens: token ids whose rows are left out, for example the special ones.
            pinned: whether batches lie in pinned memory, for copies to a GPU beside its work.
            ahead: batches that a thread gathers before they are asked for.
            drop_last: whether the rows of an epoch that fill no batch are left out; otherwise they
                come as a smaller batch.
            shards: those that are read; None: all.
            shuffle: whether shards and rows come in random order, or as they are stored.
            part: rows of each batch that are given, where other processes take the rest of it;
                None: all. Shards that have none of them are not read.

        Raises:
            ConfigError: the split has fewer rows than a batch.
        """
        if batch_rows > split.rows and drop_last:
            raise ConfigError(
                f"batch_rows: {batch_rows:,} rows in a batch, but {split.where} holds "
                f"{split.rows:,} training rows. Choose a smaller batch."
            )
        self.split, self.names, self.batch_rows = split, names, batch_rows
        self.seed, self.shards_at_once, self.drop_last = seed, shards_at_once, drop_last
        self.ahead, self.shuffle = ahead, shuffle
        assert part is None or drop_last, "parts are those of whole batches"
        self.part = range(batch_rows) if part is None else part
        self.shards = None if shards is None else frozenset(shards)
        self.cursor = START
        """After the last batch that was given."""
        self.waited = 0.0
        """Seconds spent waiting for shards to be read."""
        self._without = frozenset(without_tokens)
        self._stopped = threading.Event()
        self._buffers = [
            [
                torch.empty(
                    (len(self.part), int(split.spec(n).width or 0)),
                    dtype=torch.bfloat16,
                    pin_memory=pinned,
                )
                for n in names
            ]
            for _ in range(ahead + 2 if ahead else 1)
        ]

    def batches(self, start: Cursor = START) -> Iterator[tuple[torch.Tensor, ...]]:
        """Batches without end, epoch after epoch, from `start` on.

        Yields:
            One bfloat16 tensor (batch_rows, width) per array, or with the rows of `part`, in
            buffers that the next batch overwrites.
        """
        epoch, group, row = start
        while True:
            given = 0
            for batch in self._given(self._batches(self._epoch(epoch, group), epoch, row)):
                given += 1
                yield batch
            if not given and (group, row) == (0, 0):
                raise ConfigError(
                    f"batch_rows: {self.split.where} has fewer than {self.batch_rows:,} rows that "
                    f"are read, so no batch. Choose a smaller batch."
                )
            epoch, group, row = epoch + 1, 0, 0

    def epoch_batches(self, epoch: int) -> Iterator[tuple[torch.Tensor, ...]]:
        """The batches of one epoch, as `batches` gives them; none where there are no rows."""
        yield from self._given(self._batches(self._epoch(epoch, 0), epoch, 0))

    def ring_batches(
        self,
        start: Cursor,
        ended: Callable[[], bool],
        stopping: Callable[[], bool] = lambda: False,
    ) -> Iterator[tuple[torch.Tensor, ...]]:
        """Batches of a ring, each row once, in the order in which shards are committed.

        Args:
            start: where to begin; the number of a group is that of its first shard.
            ended: whether the capture has ended and commits no more.
            stopping: whether to wait for shards no longer: what is there still comes.
        """
        groups = self._ring_groups(start.group, ended, stopping)
        yield from self._given(self._batches(groups, 0, start.row))

    def _given(
        self, source: Generator[tuple[tuple[torch.Tensor, ...], Cursor], None, None]
    ) -> Iterator[tuple[torch.Tensor, ...]]:
        self._stopped.clear()
        items = prefetched(source, self.ahead) if self.ahead else source
        try:
            for batch, cursor in items:
                self.cursor = cursor
                yield batch
        finally:
            # A thread may wait for shards that nobody needs any more.
            self._stopped.set()
            items.close()

    def _epoch(self, epoch: int, first: int) -> Iterator[tuple[int, list[int]]]:
        """The groups of an epoch: number and shards."""
        order = list(range(self.split.shards))
        if self.shuffle:
            order = shard_order(self.seed, epoch, self.split.shards)
        if self.shards is not None:
            order = [shard for shard in order if shard in self.shards]
        size = self.shards_at_once
        for group in range(first, -(-len(order) // size)):
            yield group, order[group * size : (group + 1) * size]

    def _ring_groups(
        self, at: int, ended: Callable[[], bool], stopping: Callable[[], bool]
    ) -> Iterator[tuple[int, list[int]]]:
        while not self._stopped.is_set():
            over = ended()  # asked first: what is committed afterwards is then seen
            self.split.refresh()
            n = min(self.shards_at_once, self.split.shards - at)
            if n == self.shards_at_once or (over and n > 0):
                yield at, list(range(at, at + n))
                at += n
            elif over or stopping():
                return
            else:
                time.sleep(_POLL_SECONDS)

    def _open(
        self, groups: Iterator[tuple[int, list[int]]], epoch: int, skip: int, filled: int
    ) -> Group | None:
        """Map the shards of the next group, read them from the disk and put its rows in order.

        Args:
            groups: number and shards of each.
            epoch: that they belong to.
            skip: rows of the group that were given before.
            filled: rows that wait for the first batch of the group already.
        """
        found = next(groups, None)
        if found is None:
            return None
        number, shards = found
        # Counted from 1: the epoch's own order is drawn with counter 0.
        philox = np.random.Philox(key=[self.seed, epoch], counter=[0, 0, 0, number + 1])
        n = len(shards) * self.split.grid.shard_rows
        order = np.arange(n, dtype=np.int32)
        if self.shuffle:
            order = np.random.Generator(philox).permutation(n).astype(np.int32)
        masks = [kept_rows(self.split, shard, self.names, self._without) for shard in shards]
        if masks[0] is not None:
            kept = np.concatenate([m for m in masks if m is not None])
            order = order[kept[order]]
        first = skip + self.batch_rows - filled
        order[skip:first].sort()
        whole = first + max(0, len(order) - first) // self.batch_rows * self.batch_rows
        if whole > first:
            order[first:whole].reshape(-1, self.batch_rows).sort(axis=1)
        order[whole:].sort()
        rows: dict[str, dict[int, ShardRows]] = {name: {} for name in self.names}
        used = self._used(order, skip, filled)
        self.split.fetch(self.names, [shards[i] for i in used])
        for i in used:
            for name in self.names:
                rows[name][i] = self.split.shard_rows(name, shards[i])
                rows[name][i].load()
        return Group(number, shards, rows, order, skip)

    def _used(self, order: NDArray[np.int32], skip: int, filled: int) -> list[int]:
        """Which shards of a group, counted in it, have rows that are given."""
        mine = order[skip:]
        if len(self.part) < self.batch_rows:
            place = (np.arange(len(mine)) + filled) % self.batch_rows
            mine = mine[(place >= self.part.start) & (place < self.part.stop)]
        found: list[int] = np.flatnonzero(np.bincount(mine // self.split.grid.shard_rows)).tolist()
        return found

    def _batches(
        self,
        groups: Iterator[tuple[int, list[int]]],
        epoch: int,
        skip: int,
    ) -> Generator[tuple[tuple[torch.Tensor, ...], Cursor], None, None]:
        """Batches of a sequence of groups, with the cursor after each."""
        slot = filled = 0
        with ThreadPoolExecutor(1, thread_name_prefix="load") as reader:
            try:
                coming = reader.submit(self._open, groups, epoch, skip, 0)
                while True:
                    before = time.perf_counter()
                    group = coming.result()
                    self.waited += time.perf_counter() - before
                    if group is None:
                        break
                    at = group.skip
                    left = (filled + len(group.order) - at) % self.batch_rows
                    coming = reader.submit(self._open, groups, epoch, 0, left)
                    while at < len(group.order):
                        buffers = self._buffers[slot]
                        n = min(self.batch_rows - filled, len(group.order) - at)
                        mine = range(max(filled, self.part.start), min(filled + n, self.part.stop))
                        if mine:
                            rows = group.order[at - filled + mine.start : at - filled + mine.stop]
                            self._gather(group, rows, buffers, mine.start - self.part.start)
                        at += n
                        filled += n
                        if filled == self.batch_rows:
                            yield tuple(buffers), Cursor(epoch, group.number, at)
                            filled = 0
                            slot = (slot + 1) % len(self._buffers)
                if filled and not self.drop_last:
                    yield tuple(b[:filled] for b in self._buffers[slot]), Cursor(epoch + 1, 0, 0)
            finally:  # before the thread is waited for, which may wait for shards itself
                self._stopped.set()

    def _gather(
        self, group: Group, rows: NDArray[np.int32], buffers: list[torch.Tensor], at: int
    ) -> None:
        """Copy rows of a group's union into the buffers, from row `at` on."""
        size = self.split.grid.shard_rows
        bounds = np.searchsorted(rows, np.arange(len(group.shards) + 1) * size)
        for i, (start, stop) in enumerate(pairwise(bounds.tolist())):
            if start == stop:
                continue
            mine = torch.from_numpy(rows[start:stop] - i * size)
            for name, buffer in zip(self.names, buffers, strict=True):
                group.rows[name][i].take(mine, buffer[at + start : at + stop])

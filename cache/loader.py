"""Random batches of a store's training rows, read in large sequential pieces.

Per epoch the shards are put in a random order and taken `shards_at_once` at a time; the rows of
their union come in random order. A store whose rows were scattered when they were written gives
batches whose mean varies hardly more than that of independent rows (docs/format.md, Shuffle).

The order is a pure function of (seed, epoch): a cursor of two integers resumes it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch

from bsc.cache.store import StoreSplit
from bsc.errors import ConfigError

__all__ = ["START", "Cursor", "Loader"]

SHARDS_AT_ONCE = 4


class Cursor(NamedTuple):
    """Where a loader is: enough to go on from there."""

    epoch: int
    batch: int
    """Batches already given in this epoch."""


START = Cursor(0, 0)


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
    ) -> None:
        """Prepare to read; opens no shard.

        Args:
            split: rows to read.
            names: activation arrays, for example ``("layers.3.mlp/input",)``.
            batch_rows: rows in a batch; the rows of an epoch that fill no batch are left out.
            seed: of the order.
            shards_at_once: shards whose rows are mixed.

        Raises:
            ConfigError: the split has fewer rows than a batch.
        """
        if batch_rows > split.rows:
            raise ConfigError(
                f"batch_rows: {batch_rows:,} rows in a batch, but {split.root} holds "
                f"{split.rows:,} training rows. Choose a smaller batch."
            )
        self.split, self.names, self.batch_rows = split, names, batch_rows
        self.seed, self.shards_at_once = seed, shards_at_once
        self._buffers = [
            torch.empty(split.spec(n).row_shape(batch_rows), dtype=torch.bfloat16) for n in names
        ]

    @property
    def batches_per_epoch(self) -> int:
        """Batches of one pass over the rows."""
        return self.split.rows // self.batch_rows

    def batches(self, start: Cursor = START) -> Iterator[tuple[torch.Tensor, ...]]:
        """Batches without end, epoch after epoch, from `start` on.

        Yields:
            One bfloat16 tensor (batch_rows, width) per array, in buffers that the next batch
            overwrites.
        """
        epoch, skip = start
        while True:
            yield from self._epoch(epoch, skip)
            epoch, skip = epoch + 1, 0

    def _epoch(self, epoch: int, skip: int) -> Iterator[tuple[torch.Tensor, ...]]:
        rng = np.random.Generator(np.random.Philox(key=[self.seed, epoch]))
        order = rng.permutation(self.split.shards)
        size = self.split.grid.shard_rows
        filled = batch = 0
        for at in range(0, len(order), self.shards_at_once):
            shards = order[at : at + self.shards_at_once]
            mixed = torch.from_numpy(rng.permutation(len(shards) * size))
            done = 0
            while done < len(mixed):
                n = min(self.batch_rows - filled, len(mixed) - done)
                if batch >= skip and batch < self.batches_per_epoch:
                    self._gather(shards, mixed[done : done + n], filled)
                done += n
                filled += n
                if filled == self.batch_rows:
                    if skip <= batch:
                        yield tuple(self._buffers)
                    filled = 0
                    batch += 1

    def _gather(self, shards: np.ndarray[tuple[int], np.dtype[np.int64]], rows: torch.Tensor,
                at: int) -> None:  # fmt: skip
        """Copy rows, numbered through the union of `shards`, to the buffers from row `at` on."""
        size = self.split.grid.shard_rows
        owner = rows.div(size, rounding_mode="floor")
        for i, shard in enumerate(shards):
            mine = rows[owner == i] - i * size
            for name, buffer in zip(self.names, self._buffers, strict=True):
                source = self.split.tensor(name, int(shard))
                torch.index_select(source, 0, mine, out=buffer[at : at + len(mine)])
            at += len(mine)

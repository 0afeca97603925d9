"""How far apart writers and readers of a ring can be: windows, checkpoints, batches.

With N slots, windows of W shards over all writers, and a reader whose last checkpoint needs shard p
and all that follow: the writers open every window that ends before p + N, so at least the shards
before p + N - W + 1 are there. The reader opens S shards at a time, so it can read p up to
p + N - W - S + 1 at least, without a checkpoint. It writes one before that, and everything moves.
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["SHARDS_AT_ONCE", "RingRoom"]

SHARDS_AT_ONCE = 4
"""Shards whose rows a reader mixes; fewer where a ring has no room for them."""


class RingRoom(NamedTuple):
    """The room of a ring."""

    slots: int
    """Shards on disk at most."""
    window: int
    """Shards of a window of all writers together; at most half of the slots."""
    shards: int
    """Shards that pass through it in all."""
    shard_rows: int

    @property
    def shards_at_once(self) -> int:
        """Shards whose rows a reader mixes."""
        return min(SHARDS_AT_ONCE, max(1, (self.slots - self.window + 1) // 2))

    @property
    def most_shards(self) -> int:
        """Shards after a checkpoint that a reader surely gets to before its next one; all of them
        where the ring holds all."""
        if self.shards <= self.slots:
            return self.shards
        at_once = self.shards_at_once
        return (self.slots - self.window + 1 - at_once) // at_once * at_once

    @property
    def checkpoint_shards(self) -> int:
        """Shards after a checkpoint at which a reader writes the next one: half of the most, so
        that it does not wait for the writers, nor they for it."""
        at_once = self.shards_at_once
        return max(at_once, self.most_shards // 2 // at_once * at_once)

    @property
    def checkpoint_rows(self) -> int:
        """Rows of those shards."""
        return self.checkpoint_shards * self.shard_rows

    @property
    def batch_rows(self) -> int:
        """Rows of the largest batch: what is surely there beside the shards up to a checkpoint."""
        beside = self.most_shards - self.checkpoint_shards
        return max(self.shards_at_once, beside) * self.shard_rows

    def fits(self, rows: int) -> bool:
        """Whether readers can go without a checkpoint for so many rows."""
        return self.shards <= self.slots or self._held(rows, self.shards_at_once) <= (
            self.most_shards
        )

    def slots_for(self, rows: int) -> int:
        """Slots of a ring with such windows whose readers can."""
        at_once = SHARDS_AT_ONCE
        held = -(-self._held(rows, at_once) // at_once) * at_once
        return min(self.shards, max(2 * self.window, held + self.window + at_once - 1))

    def _held(self, rows: int, at_once: int) -> int:
        """Shards that a reader holds after so many rows, at most: its checkpoint stands somewhere
        in a group of shards."""
        return -(-rows // self.shard_rows) + at_once

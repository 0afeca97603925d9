"""A writer's side of a ring: it waits until there is room for its next window."""

from __future__ import annotations

import time
from collections.abc import Sequence

from bsc.cache.store.folder import StoreFolder
from bsc.cache.store.layout import ArraySpec, Grid
from bsc.cache.store.ring import BEAT_SECONDS, ReaderCursor, RingSide, text_ends_at, who_writes
from bsc.progress import console

__all__ = ["SILENT_SECONDS", "RingWriter"]

SILENT_SECONDS = 60.0
"""A reader on another machine that does not touch its cursor for so long is reported."""
_POLL_SECONDS = 0.1


class RingWriter(RingSide):
    """A writer's side: waits until there is room."""

    def __init__(
        self,
        folder: StoreFolder,
        specs: dict[str, ArraySpec],
        grid: Grid,
        slots: int,
        rank: int = 0,
        writers: int = 1,
    ) -> None:
        """Watch the ring of a store.

        Args:
            folder: the store.
            specs: arrays of its training split.
            grid: of the training split, as planned.
            slots: shards that may be on disk.
            rank: of this writer.
            writers: in all.
        """
        super().__init__(folder, specs, grid)
        self.slots, self.rank, self.writers = slots, rank, writers
        self._seen: dict[str, tuple[int, float]] = {}
        self._told: set[str] = set()

    def wait_for_room(self, shards: Sequence[int]) -> bool:
        """Wait until a window of these shards fits into the ring.

        Returns:
            Whether it does; False if no reader will ever get to it, since the text of another
            writer has ended before.
        """
        waiting_since = look_again = time.monotonic()
        while True:
            cursors = self.sweep()
            kept = min(c.next_shard for c in cursors) if cursors else self.first_kept()
            if self.writers > 1:
                end = text_ends_at(
                    self.folder, self.grid.shards, self.grid.shard_rows, self.writers
                )
                if shards[0] > end:
                    console.print(
                        f"{self.folder}: the text of part {end % self.writers} has ended before "
                        f"shard {end}, so no reader can get to what part {self.rank} would write "
                        f"next; it ends here"
                    )
                    return False
            if shards[-1] - kept < self.slots:
                return True
            waited = time.monotonic() - waiting_since
            if not cursors and waited > 1:
                self._tell(
                    "no reader",
                    f"{self.folder}: the ring is full and has no reader; start one with `bsc train "
                    f"--store {self.folder}`",
                )
            self._look_for_dead(cursors)
            if waited > SILENT_SECONDS and time.monotonic() > look_again:
                look_again = time.monotonic() + BEAT_SECONDS
                self._look_for_missing()
            time.sleep(_POLL_SECONDS)

    def _tell(self, what: str, sentence: str) -> None:
        if what not in self._told:
            self._told.add(what)
            console.print(sentence)

    def _look_for_missing(self) -> None:
        """Name the writer whose shard every reader waits for, if nobody writes it."""
        committed = self.committed()
        other = committed % self.writers
        if other == self.rank or f"part {other}" in self._told:
            return
        if who_writes(self.folder, other) is not None:
            return
        self._tell(
            f"part {other}",
            f"{self.folder}: shard {committed} is the next that readers need, and no process on "
            f"this machine writes part {other}, which it belongs to. If none does elsewhere, start "
            f"it again: the same command with --rank {other}.",
        )

    def _look_for_dead(self, cursors: list[ReaderCursor]) -> None:
        now = time.monotonic()
        for cursor in cursors:
            beat, since = self._seen.get(cursor.reader, (-1, now))
            if beat != cursor.beat:
                self._seen[cursor.reader] = (cursor.beat, now)
                self._told.discard(cursor.reader)
                since = now
            silent = now - since
            if not (cursor.is_dead() or silent > SILENT_SECONDS):
                continue
            state = "is gone" if cursor.is_dead() else f"has been silent for {silent:.0f} s"
            self._tell(
                cursor.reader,
                f"{self.folder}: {cursor.who} {state} and holds the ring at shard "
                f"{cursor.next_shard}. Start it again (the same command with --continue), or "
                f"go on without it: "
                f"`bsc ring {self.folder} --drop {cursor.reader}`",
            )

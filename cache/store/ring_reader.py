"""A reader's side of a ring: it says which shards it may still need."""

from __future__ import annotations

import os
import re
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from bsc.cache.store.folder import StoreFolder
from bsc.cache.store.layout import ArraySpec, Grid
from bsc.cache.store.ring import (
    BEAT_SECONDS,
    ReaderCursor,
    RingSide,
    cursor_key,
    read_cursor,
    write_cursor,
)
from bsc.errors import UserError
from bsc.progress import console

__all__ = ["RingReader", "reading"]

_TAKE_OVER_BEATS = 5
"""Beats of its other process that a reader waits for before it takes its place."""
_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,100}")


class RingReader(RingSide):
    """A reader's side: says which shards it may still need."""

    def __init__(
        self,
        folder: StoreFolder,
        specs: dict[str, ArraySpec],
        grid: Grid,
        name: str,
        *,
        others: Sequence[str] = (),
    ) -> None:
        """Join the ring at the first shard that is there, or where this reader was.

        Args:
            folder: the store.
            specs: arrays of its training split.
            grid: of the training split.
            name: of the reader.
            others: readers that are to begin at the same shard, whenever they are started: places
                are kept for them unless this reader has one already.

        Raises:
            UserError: the name cannot be that of a reader, or another process has it.
        """
        super().__init__(folder, specs, grid)
        if not _NAME.fullmatch(name):
            raise UserError(
                f"--name {name}: a reader of a ring needs a name of letters, digits, '.', '_', '-'."
            )
        self.name = name
        self._mutex = threading.Lock()
        self._stop = threading.Event()
        self._told = False
        self._wait_for_other()
        with folder.locked():
            mine = read_cursor(folder, cursor_key(name))
            self._beat = mine.beat if mine else 0
            there = self.first_kept()
            self.next_shard = max(there, mine.next_shard if mine else 0)
            self._save()
            for other in others if mine is None else ():
                if other != name and not folder.exists(cursor_key(other)):
                    write_cursor(folder, ReaderCursor(other, self.next_shard, 0, 0, ""))
        self._thread = threading.Thread(target=self._live, name="ring-beat", daemon=True)
        self._thread.start()

    def _wait_for_other(self) -> None:
        """Wait until another process that had this name has surely ended."""
        key, first = cursor_key(self.name), None
        for beat in range(_TAKE_OVER_BEATS * 10):
            mine = read_cursor(self.folder, key)
            if mine is None or not mine.beat or mine.is_mine or mine.is_dead():
                return
            if first is None:
                first = mine
                console.print(f"{self.folder}: seeing whether {mine.who} still lives")
            if mine.beat != first.beat:
                raise UserError(
                    f"{self.folder}: {mine.who} reads this ring under that name. Choose another "
                    f"--name, or stop that process."
                )
            if beat < _TAKE_OVER_BEATS * 10 - 1:
                time.sleep(BEAT_SECONDS / 10)
        assert first is not None
        console.print(f"{self.folder}: {first.who} is silent; this process takes its place")

    def _save(self) -> None:
        self._beat += 1
        write_cursor(
            self.folder,
            ReaderCursor(self.name, self.next_shard, self._beat, os.getpid(), socket.gethostname()),
        )

    def _live(self) -> None:
        while not self._stop.wait(BEAT_SECONDS):
            with self._mutex:
                if not self._stop.is_set():
                    try:
                        self._save()
                    except OSError as error:  # a full disk, for moments: the next beat may do
                        self._tell_of(error)

    def _tell_of(self, error: OSError) -> None:
        if not self._told:
            self._told = True
            console.print(f"{self.folder}: its cursor cannot be written ({error.strerror})")

    def passed(self, next_shard: int) -> None:
        """Say that no shard before `next_shard` is needed again, whatever happens."""
        if next_shard > self.next_shard:
            with self._mutex:
                self.next_shard = next_shard
                self._save()
            self.sweep()

    def close(self, *, leave: bool) -> None:
        """Stop; `leave` the ring for good, or keep the place for a restart."""
        self._stop.set()
        self._thread.join()
        if leave:
            with self._mutex:
                self.folder.delete(cursor_key(self.name))


@contextmanager
def reading(ring: RingReader) -> Iterator[RingReader]:
    """A block that reads a ring: leaves it when it ends well, keeps its place when it fails."""
    try:
        yield ring
    except BaseException:
        ring.close(leave=False)
        raise
    ring.close(leave=True)

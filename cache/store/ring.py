"""A store that passes through a bounded disk: the ring.

At most `slots` shards of the training split are on disk. Every reader keeps a cursor file in
`ring/`, with the first shard that it still needs; shards that every reader has passed are removed;
the writer waits for room before it opens a window. Nothing is dropped: the slowest reader sets the
pace. A reader that dies is named, and holds the ring until it is started again or its file deleted.
"""

from __future__ import annotations

import os
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass

from bsc.cache.store.folder import PARTIAL, StoreFolder, process_is_gone
from bsc.cache.store.layout import ArraySpec, Grid, shard_key
from bsc.cache.store.manifest import read_array_json
from bsc.errors import StoreError, UserError
from bsc.files import canonical_json
from bsc.progress import console
from bsc.records import parse_json

__all__ = ["RING", "ReaderCursor", "RingReader", "RingWriter", "readers"]

RING = "ring"
SILENT_SECONDS = 60.0
"""A reader on another machine that does not touch its cursor for so long is reported."""
BEAT_SECONDS = 5.0
_POLL_SECONDS = 0.1
_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,80}")


@dataclass(frozen=True)
class ReaderCursor:
    """Where a reader of a ring is."""

    reader: str
    next_shard: int
    """First shard that it still needs."""
    beat: int
    """Grows while the reader lives."""
    process: int
    host: str

    @property
    def who(self) -> str:
        """The reader in words."""
        return f"reader {self.reader} (process {self.process} on {self.host})"

    def is_dead(self) -> bool:
        """Whether its process is surely gone; only this machine's processes can be asked."""
        return process_is_gone(self.process, self.host)


def _key(reader: str) -> str:
    return f"{RING}/{reader}.json"


def readers(folder: StoreFolder) -> list[ReaderCursor]:
    """The cursors of a ring.

    Raises:
        StoreError: a cursor file is damaged.
    """
    found = []
    for key in folder.keys(RING):
        if not key.endswith(".json"):
            continue
        try:
            value = parse_json(folder.read(key))
            cursor = ReaderCursor(**value)
            if min(int(cursor.next_shard), int(cursor.process)) < 0:
                raise ValueError("negative number")
        except FileNotFoundError:  # ended meanwhile
            continue
        except (ValueError, TypeError) as error:
            raise StoreError(
                f"{folder}/{key}: not the cursor of a reader ({error}). Delete it if no training "
                f"run uses it."
            ) from None
        found.append(cursor)
    return found


def first_kept(folder: StoreFolder, spec: ArraySpec, shards: int) -> int:
    """First of the committed shards of an array that is still on disk."""
    low, high = 0, shards
    while low < high:  # removed in order, so those that are gone come first
        middle = (low + high) // 2
        if folder.exists(shard_key(spec, middle)):
            high = middle
        else:
            low = middle + 1
    return low


class _Ring:
    def __init__(self, folder: StoreFolder, specs: dict[str, ArraySpec], grid: Grid) -> None:
        self.folder, self.specs, self.grid = folder, list(specs.values()), grid
        self._swept = 0

    def committed(self) -> int:
        """Committed shards."""
        rows = [read_array_json(self.folder, spec)[0] for spec in self.specs]
        return min(rows) // self.grid.shard_rows

    def sweep(self) -> list[ReaderCursor]:
        """Remove shards that every reader has passed."""
        with self.folder.locked():
            cursors = readers(self.folder)
            if cursors:
                oldest = min(c.next_shard for c in cursors)
                for shard in range(self._swept, min(oldest, self.committed())):
                    for spec in self.specs:  # the first array goes first: `first_kept`
                        self.folder.delete(shard_key(spec, shard))
                    self._swept = shard + 1
        return cursors


class RingWriter(_Ring):
    """The writer's side: waits until there is room."""

    def __init__(
        self, folder: StoreFolder, specs: dict[str, ArraySpec], grid: Grid, slots: int
    ) -> None:
        """Watch the ring of a store.

        Args:
            folder: the store.
            specs: arrays of its training split.
            grid: of the training split.
            slots: shards that may be on disk.
        """
        super().__init__(folder, specs, grid)
        self.slots = slots
        self._seen: dict[str, tuple[int, float]] = {}
        self._told: set[str] = set()

    def wait_for_room(self, last_shard: int) -> None:
        """Wait until a window that ends with `last_shard` fits into the ring."""
        waiting_since = time.monotonic()
        while True:
            cursors = self.sweep()
            oldest = min((c.next_shard for c in cursors), default=0)
            if last_shard - oldest < self.slots:
                return
            if not cursors:
                waited = time.monotonic() - waiting_since
                if waited > 1 and "" not in self._told:
                    self._told.add("")
                    console.print(
                        f"{self.folder}: the ring is full and has no reader; start one with `bsc "
                        f"train --store {self.folder}`"
                    )
            self._look_for_dead(cursors)
            time.sleep(_POLL_SECONDS)

    def _look_for_dead(self, cursors: list[ReaderCursor]) -> None:
        now = time.monotonic()
        for cursor in cursors:
            beat, since = self._seen.get(cursor.reader, (-1, now))
            if beat != cursor.beat:
                self._seen[cursor.reader] = (cursor.beat, now)
                self._told.discard(cursor.reader)
                since = now
            silent = now - since
            if cursor.reader in self._told or not (cursor.is_dead() or silent > SILENT_SECONDS):
                continue
            self._told.add(cursor.reader)
            state = "is gone" if cursor.is_dead() else f"has been silent for {silent:.0f} s"
            console.print(
                f"{self.folder}: {cursor.who} {state} and holds the ring at shard "
                f"{cursor.next_shard}. Start it again under the same name, or delete "
                f"{self.folder}/{_key(cursor.reader)} to go on without it."
            )


class RingReader(_Ring):
    """A reader's side: says where it is, and waits for shards."""

    def __init__(
        self, folder: StoreFolder, specs: dict[str, ArraySpec], grid: Grid, name: str
    ) -> None:
        """Join the ring at the first shard that is there, or where this reader was.

        Raises:
            UserError: the name cannot be that of a reader, or another process has it.
        """
        super().__init__(folder, specs, grid)
        if not _NAME.fullmatch(name):
            raise UserError(
                f"--name {name}: a reader of a ring needs a name of letters, digits, '.', '_', '-'."
            )
        self.name = name
        self._beat = 0
        self._mutex = threading.Lock()
        self._stop = threading.Event()
        with folder.locked():
            mine = next((c for c in readers(folder) if c.reader == name), None)
            if mine is not None and not mine.is_dead() and mine.process != os.getpid():
                raise UserError(
                    f"{folder}: {mine.who} reads this ring under that name. Choose another --name, "
                    f"or delete {folder}/{_key(name)} if it is dead."
                )
            there = first_kept(folder, self.specs[0], self.committed())
            self.next_shard = max(there, mine.next_shard if mine else 0)
            self._save()
        self._thread = threading.Thread(target=self._live, name="ring-beat", daemon=True)
        self._thread.start()

    def _save(self) -> None:
        self._beat += 1
        value = ReaderCursor(
            self.name, self.next_shard, self._beat, os.getpid(), socket.gethostname()
        )
        self.folder.write_text(_key(self.name), canonical_json(asdict(value)))

    def _live(self) -> None:
        while not self._stop.wait(BEAT_SECONDS):
            with self._mutex:
                if not self._stop.is_set():
                    self._save()

    def passed(self, next_shard: int) -> None:
        """Say that every shard before `next_shard` has been read to the end."""
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
                self.folder.delete(_key(self.name))


@contextmanager
def reading(ring: RingReader) -> Iterator[RingReader]:
    """A block that reads a ring: leaves it when it ends well, keeps its place when it fails."""
    try:
        yield ring
    except BaseException:
        ring.close(leave=False)
        raise
    ring.close(leave=True)


def is_ring_file(key: str) -> bool:
    """Whether a file of a store belongs to its ring."""
    return key.startswith(f"{RING}/") and (key.endswith((".json", PARTIAL)))

"""A store that passes through a bounded disk: the ring.

At most `slots` shards of the training split are on disk. Every reader keeps a cursor file in
`ring/`, with the first shard that it still needs if it has to go on from its last checkpoint;
shards that every reader has passed are removed; each writer waits for room before it opens a
window. Nothing is dropped: the slowest reader sets the pace. A reader that is gone is named, and
holds the ring until it is started again or dropped (`bsc ring STORE --drop NAME`).

Nobody coordinates: every step is a function of the files, taken under the store's lock.
"""

from __future__ import annotations

import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass

from bsc.cache.store.folder import (
    PARTIAL,
    LocalFolder,
    StoreFolder,
    process_is_gone,
    writer_lock,
)
from bsc.cache.store.layout import ArraySpec, Grid, shard_key
from bsc.cache.store.manifest import read_array_json, read_end
from bsc.errors import StoreError, UserError
from bsc.files import canonical_json
from bsc.locks import holder
from bsc.progress import console
from bsc.records import parse_json

__all__ = [
    "BEAT_SECONDS",
    "RING",
    "ReaderCursor",
    "RingReader",
    "RingWriter",
    "drop_reader",
    "first_kept",
    "is_ring_file",
    "readers",
    "reading",
    "text_ends_at",
    "who_writes",
]

RING = "ring"
SILENT_SECONDS = 60.0
"""A reader on another machine that does not touch its cursor for so long is reported."""
BEAT_SECONDS = 5.0
_TAKE_OVER_BEATS = 5
"""Beats of its other process that a reader waits for before it takes its place."""
_POLL_SECONDS = 0.1
_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,100}")


@dataclass(frozen=True)
class ReaderCursor:
    """Where a reader of a ring is."""

    reader: str
    next_shard: int
    """First shard that it still needs: where it would go on after a kill."""
    beat: int
    """Grows while the reader lives; 0: it has not begun."""
    process: int
    host: str

    @property
    def who(self) -> str:
        """The reader in words."""
        if not self.beat:
            return f"reader {self.reader} (not started yet)"
        return f"reader {self.reader} (process {self.process} on {self.host})"

    @property
    def key(self) -> str:
        """Its file."""
        return cursor_key(self.reader)

    @property
    def is_mine(self) -> bool:
        """Whether it is that of this process."""
        return (self.process, self.host) == (os.getpid(), socket.gethostname())

    def is_dead(self) -> bool:
        """Whether its process is surely gone; only this machine's processes can be asked."""
        return bool(self.beat) and process_is_gone(self.process, self.host)


def cursor_key(reader: str) -> str:
    """The file of a reader's cursor."""
    return f"{RING}/{reader}.json"


def _read_cursor(folder: StoreFolder, key: str) -> ReaderCursor | None:
    try:
        cursor = ReaderCursor(**parse_json(folder.read(key)))
        if min(int(n) for n in (cursor.next_shard, cursor.process, cursor.beat)) < 0:
            raise ValueError("negative number")
        if cursor_key(cursor.reader) != key:
            raise ValueError(f"it is called {cursor.reader!r:.100}")
    except FileNotFoundError:  # ended meanwhile
        return None
    except (ValueError, TypeError) as error:
        raise StoreError(
            f"{folder}/{key}: not the cursor of a reader ({error}). Delete it if no training "
            f"run uses it."
        ) from None
    return cursor


def readers(folder: StoreFolder) -> list[ReaderCursor]:
    """The cursors of a ring, by name.

    Raises:
        StoreError: a cursor file is damaged.
    """
    keys = sorted(key for key in folder.keys(RING) if key.endswith(".json"))
    found = (_read_cursor(folder, key) for key in keys)
    return [cursor for cursor in found if cursor is not None]


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


def who_writes(folder: StoreFolder, rank: int) -> str | None:
    """Which process writes a part of a store now; None where none does, or it cannot be known."""
    return holder(folder.path(writer_lock(rank))) if isinstance(folder, LocalFolder) else None


def text_ends_at(folder: StoreFolder, shards: int, shard_rows: int, writers: int) -> int:
    """First shard that no writer will ever write, because a text ended; `shards` if there is none.

    No reader can get beyond it.

    Args:
        folder: the store.
        shards: of the training split, as planned.
        shard_rows: rows of each.
        writers: of the store.

    Raises:
        StoreError: what a writer said at its end is damaged.
    """
    first = shards
    for rank in range(writers):
        end = read_end(folder, rank)
        if end is not None:
            first = min(first, rank + writers * (end.rows["train"] // shard_rows))
    return first


class _Ring:
    def __init__(self, folder: StoreFolder, specs: dict[str, ArraySpec], grid: Grid) -> None:
        self.folder, self.specs, self.grid = folder, list(specs.values()), grid
        self._swept: int | None = None

    def committed(self) -> int:
        """Committed shards."""
        rows = [read_array_json(self.folder, spec)[0] for spec in self.specs]
        return min(rows) // self.grid.shard_rows

    def first_kept(self) -> int:
        """First shard that is still on disk."""
        return first_kept(self.folder, self.specs[0], self.committed())

    def sweep(self) -> list[ReaderCursor]:
        """Remove shards that every reader has passed."""
        cursors = readers(self.folder)
        if not cursors or min(c.next_shard for c in cursors) <= (self._swept or 0):
            return cursors
        with self.folder.locked():  # under which readers join
            cursors = readers(self.folder)
            committed = self.committed()
            if self._swept is None:
                # The first array goes first, so of the shard before others may be left.
                kept = first_kept(self.folder, self.specs[0], committed)
                self._swept = max(0, kept - 1)
            oldest = min((c.next_shard for c in cursors), default=0)
            for shard in range(self._swept, min(oldest, committed)):
                for spec in self.specs:
                    self.folder.delete(shard_key(spec, shard))
                self._swept = shard + 1
        return cursors


class RingWriter(_Ring):
    """A writer's side: waits until there is room."""

    def __init__(
        self,
        folder: StoreFolder,
        specs: dict[str, ArraySpec],
        grid: Grid,
        slots: int,
        *,
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
        waiting_since = time.monotonic()
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
            if waited > SILENT_SECONDS and self.writers > 1:
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
        if other == self.rank or who_writes(self.folder, other) is not None:
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
                f"{cursor.next_shard}. Start it again (`bsc train --resume`), or go on without it: "
                f"`bsc ring {self.folder} --drop {cursor.reader}`",
            )


class RingReader(_Ring):
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
        self._wait_for_other()
        with folder.locked():
            mine = _read_cursor(folder, cursor_key(name))
            self._beat = mine.beat if mine else 0
            there = self.first_kept()
            self.next_shard = max(there, mine.next_shard if mine else 0)
            self._save()
            for other in others if mine is None else ():
                if other != name and not folder.exists(cursor_key(other)):
                    _write(folder, ReaderCursor(other, self.next_shard, 0, 0, ""))
        self._thread = threading.Thread(target=self._live, name="ring-beat", daemon=True)
        self._thread.start()

    def _wait_for_other(self) -> None:
        """Wait until another process that had this name has surely ended."""
        key, first = cursor_key(self.name), None
        for beat in range(_TAKE_OVER_BEATS * 10):
            mine = _read_cursor(self.folder, key)
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
        _write(
            self.folder,
            ReaderCursor(self.name, self.next_shard, self._beat, os.getpid(), socket.gethostname()),
        )

    def _live(self) -> None:
        while not self._stop.wait(BEAT_SECONDS):
            with self._mutex:
                if not self._stop.is_set():
                    self._save()

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


def _write(folder: StoreFolder, cursor: ReaderCursor) -> None:
    folder.write_text(cursor.key, canonical_json(asdict(cursor)))


@contextmanager
def reading(ring: RingReader) -> Iterator[RingReader]:
    """A block that reads a ring: leaves it when it ends well, keeps its place when it fails."""
    try:
        yield ring
    except BaseException:
        ring.close(leave=False)
        raise
    ring.close(leave=True)


def drop_reader(
    folder: StoreFolder, name: str, wait: Callable[[float], None] = time.sleep
) -> ReaderCursor:
    """Take the place of a reader away that does not come back.

    Args:
        folder: the store.
        name: of the reader.
        wait: sleeps for some seconds, to see whether a reader on another machine lives.

    Returns:
        Where it was.

    Raises:
        UserError: there is no such reader, or it is alive.
    """
    known = {c.reader: c for c in readers(folder)}
    if name not in known:
        raise UserError(
            f"{folder}: no reader {name}. "
            + (f"There are {', '.join(known)}." if known else "The ring has none.")
        )
    cursor = known[name]
    if cursor.beat and not cursor.is_dead():
        wait(2 * BEAT_SECONDS + 1)
        now = _read_cursor(folder, cursor_key(name))
        if now is None:
            return cursor
        if now.beat != cursor.beat:
            raise UserError(
                f"{folder}: {cursor.who} is reading now. Stop that process first; its place is "
                f"then kept for `bsc train --resume`, or dropped by this command."
            )
    folder.delete(cursor_key(name))
    return cursor


def is_ring_file(key: str) -> bool:
    """Whether a file of a store belongs to its ring."""
    return key.startswith(f"{RING}/") and (key.endswith((".json", PARTIAL)))

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
import socket
import time
from collections.abc import Callable
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
from bsc.records import parse_json

__all__ = [
    "BEAT_SECONDS",
    "RING",
    "ReaderCursor",
    "RingSide",
    "cursor_key",
    "drop_reader",
    "first_kept",
    "is_ring_file",
    "read_cursor",
    "readers",
    "text_ends_at",
    "who_writes",
    "write_cursor",
]

RING = "ring"
BEAT_SECONDS = 5.0


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


def read_cursor(folder: StoreFolder, key: str) -> ReaderCursor | None:
    """The cursor in a file; None where there is none.

    Raises:
        StoreError: it is damaged.
    """
    try:
        cursor = ReaderCursor(**parse_json(folder.read(key)))
        numbers = (cursor.next_shard, cursor.process, cursor.beat)
        if any(type(n) is not int or n < 0 for n in numbers) or not isinstance(cursor.host, str):
            raise ValueError("a value of another kind")
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
    found = (read_cursor(folder, key) for key in keys)
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


class RingSide:
    """What writers and readers of a ring do alike."""

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


def write_cursor(folder: StoreFolder, cursor: ReaderCursor) -> None:
    """Say where a reader is."""
    folder.write_text(cursor.key, canonical_json(asdict(cursor)))


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
        now = read_cursor(folder, cursor_key(name))
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

"""What there is to say of a ring: who reads and writes it, where each is, and what it waits for."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from bsc.cache.store.folder import StoreFolder
from bsc.cache.store.manifest import committed_windows, read_end
from bsc.cache.store.ring import ReaderCursor, first_kept, readers, text_ends_at, who_writes
from bsc.cache.store.ring_writer import SILENT_SECONDS
from bsc.cache.store.store import ActivationStore
from bsc.errors import UserError
from bsc.progress import format_bytes

__all__ = ["RingStatus", "ring_status"]


@dataclass(frozen=True)
class Reader:
    """A reader of a ring."""

    name: str
    next_shard: int
    """First shard that it still needs: that of its last checkpoint."""
    behind: int
    """Committed shards that it has not passed."""
    process: str
    """Process and machine; empty: it has not begun."""
    state: str
    """alive or silent (that is not known of other machines), gone, not started."""
    touched_seconds: float | None
    """Since it last touched its cursor, by this machine's clock; None: not known."""


@dataclass(frozen=True)
class Writer:
    """A writer of a ring."""

    rank: int
    windows: int
    """That it has committed."""
    state: str
    """finished, writing, or none: no process on this machine."""
    process: str


@dataclass(frozen=True)
class RingStatus:
    """A ring at one moment."""

    store: str
    slots: int
    shards: int
    """That pass through it in all."""
    shard_rows: int
    window: int
    """Shards that all writers together commit at a time."""
    first_kept: int
    """First shard on disk."""
    committed: int
    ends_at: int
    """First shard that will never be there."""
    bytes: int
    """Of the committed shards on disk."""
    readers: tuple[Reader, ...]
    writers: tuple[Writer, ...]

    def to_json(self) -> dict[str, Any]:
        """The status for machines."""
        return asdict(self) | {"waits_for": self.waits_for()}

    def waits_for(self) -> str | None:
        """What keeps the ring from moving; None: nothing that can be seen."""
        if self.committed >= self.ends_at:
            return None
        missing = self.writers[self.committed % len(self.writers)]
        oldest = min((r.next_shard for r in self.readers), default=self.first_kept)
        end = min(self.shards, (self.committed // self.window + 1) * self.window)
        if end <= oldest + self.slots:
            if missing.state != "writing":
                return (
                    f"part {missing.rank}, which writes shard {self.committed} next: no process on "
                    f"this machine writes it"
                )
            return None
        if not self.readers:
            return f"a reader: start one with `bsc train --store {self.store}`"
        slowest = min(self.readers, key=lambda r: r.next_shard)
        if slowest.state in ("gone", "silent", "not started"):
            return (
                f"reader {slowest.name}, which is {slowest.state}. Start it again (the same "
                f"command with --continue), or go on without it: `bsc ring {self.store} --drop "
                f"{slowest.name}`"
            )
        return f"reader {slowest.name}, to write a checkpoint beyond shard {slowest.next_shard}"

    def lines(self) -> list[str]:
        """The status for people."""
        on_disk = self.committed - self.first_kept
        out = [
            f"shards     {self.committed:,} of {self.shards:,} committed; {on_disk:,} on disk "
            f"({self.first_kept:,} to {self.committed - 1:,}), {format_bytes(self.bytes)}; room "
            f"for {self.slots:,}"
            if on_disk
            else f"shards     {self.committed:,} of {self.shards:,} committed; none on disk; room "
            f"for {self.slots:,}",
        ]
        if self.ends_at < self.shards:
            out.append(f"text       ended before shard {self.ends_at:,}, which is the end")
        for r in self.readers:
            touched = "" if r.touched_seconds is None else f", {_age(r.touched_seconds)}"
            who = f" ({r.process}{touched})" if r.process else ""
            out.append(
                f"reader     {r.name}: {r.state}{who}; its checkpoint needs shard "
                f"{r.next_shard:,}, {r.behind:,} behind"
            )
        if not self.readers:
            out.append("reader     none")
        for w in self.writers:
            who = f" ({w.process})" if w.process else ""
            state = {"none": "no process on this machine"}.get(w.state, w.state)
            out.append(f"writer {w.rank:<3} {state}{who}; {w.windows:,} windows committed")
        waits = self.waits_for()
        if self.committed >= self.ends_at:
            out.append("capture    ended: no more shards will come")
        else:
            out.append(f"waits for  {waits or 'nothing that can be seen'}")
        return out


def _age(seconds: float) -> str:
    if seconds < 120:
        return f"{max(0.0, seconds):.0f} s ago"
    return f"{seconds / 60:.0f} min ago" if seconds < 7200 else f"{seconds / 3600:.1f} h ago"


def _reader(folder: StoreFolder, cursor: ReaderCursor, committed: int) -> Reader:
    age = folder.age(cursor.key)
    if not cursor.beat:
        state = "not started"
    elif cursor.is_dead():
        state = "gone"
    else:
        state = "silent" if age is not None and age > SILENT_SECONDS else "alive"
    return Reader(
        name=cursor.reader,
        next_shard=cursor.next_shard,
        behind=max(0, committed - cursor.next_shard),
        process=f"process {cursor.process} on {cursor.host}" if cursor.beat else "",
        state=state,
        touched_seconds=age if cursor.beat else None,
    )


def ring_status(store: ActivationStore) -> RingStatus:
    """Look at a ring. Nothing is changed.

    Raises:
        UserError: the store is no ring.
        StoreError: a cursor or the manifest is damaged.
    """
    room, folder, split = store.room, store.folder, store.train
    if room is None:
        raise UserError(f"{folder}: no ring: its shards stay, and training runs read them freely.")
    split.refresh()
    kept = first_kept(folder, next(iter(split.specs.values())), split.shards)
    writers = []
    for rank, windows in enumerate(committed_windows(folder, "train", store.writers)):
        who = who_writes(folder, rank)
        finished = read_end(folder, rank) is not None
        state = "finished" if finished else "writing" if who else "none"
        writers.append(Writer(rank, windows, state, who or ""))
    per_shard = sum(spec.shard_bytes(split.grid) for spec in split.specs.values())
    return RingStatus(
        store=str(folder),
        slots=room.slots,
        shards=room.shards,
        shard_rows=room.shard_rows,
        window=room.window,
        first_kept=kept,
        committed=split.shards,
        ends_at=text_ends_at(folder, room.shards, room.shard_rows, store.writers),
        bytes=per_shard * (split.shards - kept),
        readers=tuple(_reader(folder, c, split.shards) for c in readers(folder)),
        writers=tuple(writers),
    )

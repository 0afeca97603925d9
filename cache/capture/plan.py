"""What a capture comes to before it starts: bytes, shards, memory, files, and what would fit."""

from __future__ import annotations

import math
import resource
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bsc.cache.capture.staging import SLOTS
from bsc.cache.store.kinds import Codec, Split
from bsc.cache.store.layout import ROW_SCALE, ArraySpec, Grid, Hookpoint, array_specs
from bsc.cache.store.ring_room import RingRoom
from bsc.cache.store.shard import piece_bytes
from bsc.errors import UserError
from bsc.progress import format_bytes

__all__ = ["CapturePlan", "check_disk", "check_open_files", "plan_capture", "what_fits"]

MIN_SHARDS = 16
"""Fewest shards of the training split: a scatter over fewer shuffles little."""
MAX_HELD_OUT_ROWS = 1 << 20
HELD_OUT_SHARDS = 16
_DISK_SHARE = 0.98
"""Part of the free space that a store may take."""


@dataclass(frozen=True, kw_only=True)
class CapturePlan:
    """The shape of a store that is to be captured."""

    hookpoints: tuple[Hookpoint, ...]
    grids: Mapping[Split, Grid]
    codec: Codec
    window: int
    writers: int
    ring: int | None
    batch_rows: int
    """Rows of a forward pass, at most."""

    @property
    def room(self) -> RingRoom | None:
        """How far apart writers and readers can be; None: it is no ring."""
        if self.ring is None:
            return None
        train = self.grids["train"]
        return RingRoom(self.ring, self.window * self.writers, train.shards, train.shard_rows)

    def specs(self, split: Split) -> dict[str, ArraySpec]:
        """The arrays of a split."""
        return array_specs(self.hookpoints, split, self.codec)

    @property
    def arrays(self) -> dict[Split, tuple[dict[str, ArraySpec], Grid]]:
        """The arrays of every split with their grid."""
        return {split: (self.specs(split), grid) for split, grid in self.grids.items()}

    @property
    def windows(self) -> dict[Split, int]:
        """Shards that each split is scattered over at a time."""
        return {split: self.window if split == "train" else 1 for split in self.grids}

    def bytes_by_array(self) -> dict[str, int]:
        """Bytes on disk of every array at the end, both splits; lz4 counted as if uncompressed."""
        total: dict[str, int] = {}
        for split, (specs, grid) in self.arrays.items():
            shards = grid.shards
            if self.ring is not None and split == "train":
                shards = min(shards, self.ring)
            for name, spec in specs.items():
                total[name] = total.get(name, 0) + shards * spec.shard_bytes(grid)
        return total

    @property
    def bytes(self) -> int:
        """Most bytes on disk at a time; lz4 counted as if uncompressed."""
        return sum(self.bytes_by_array().values())

    def bytes_by_hookpoint(self) -> dict[str, int]:
        """Bytes of each hookpoint, both sides."""
        sizes = self.bytes_by_array()
        return {
            h.name: sum(
                sizes[f"{h.name}/{side}"] + sizes.get(f"{h.name}/{side}{ROW_SCALE}", 0)
                for side in ("input", "output")
            )
            for h in self.hookpoints
        }

    def open_shards(self) -> int:
        """Shards of the training split that one writer has open at a time, at most."""
        return min(self.window, -(-self.grids["train"].shards // self.writers))

    def open_files(self) -> int:
        """Files that one writer has open at a time, at most: one per array and open shard."""
        return len(self.specs("train")) * (self.open_shards() + len(self.grids) - 1)

    def memory(self) -> int:
        """Bytes that one writer needs beside the model: buffers of shards and of blocks."""
        grid = self.grids["train"]
        pieces = sum(piece_bytes(s, grid) for s in self.specs("train").values())
        rows = sum(2 * (h.d_in + h.d_out) for h in self.hookpoints)
        # Each block is held once by the hooks and once per slot.
        return pieces * self.open_shards() + (1 + SLOTS) * self.batch_rows * rows

    def to_json(self) -> dict[str, Any]:
        """The plan for machines."""
        return {
            "rows": {split: grid.rows for split, grid in self.grids.items()},
            "shards": {split: grid.shards for split, grid in self.grids.items()},
            "shard_rows": {split: grid.shard_rows for split, grid in self.grids.items()},
            "codec": self.codec,
            "writers": self.writers,
            "ring": self.ring,
            "ring_checkpoint_rows": None if self.room is None else self.room.checkpoint_rows,
            "bytes": self.bytes,
            "bytes_by_hookpoint": self.bytes_by_hookpoint(),
            "memory_bytes": self.memory(),
            "open_files": self.open_files(),
        }


def plan_capture(
    hookpoints: tuple[Hookpoint, ...],
    *,
    tokens: int,
    held_out: float,
    held_out_tokens: int | None,
    context: int,
    batch_rows: int,
    codec: Codec = "raw",
    window: int = 64,
    writers: int = 1,
    ring: int | None = None,
) -> CapturePlan:
    """Divide the rows of a capture into shards.

    Args:
        hookpoints: what to capture.
        tokens: training rows asked for.
        held_out: share of documents that are held out.
        held_out_tokens: rows of held-out documents; None: the same share, at most 2^20.
        context: tokens in a context.
        batch_rows: rows of a forward pass.
        codec: of the store.
        window: shards to scatter over.
        writers: processes that write the store.
        ring: training shards on disk at a time; None: all.

    Raises:
        UserError: a writer would have no shard, or the ring is too small.
    """
    grids: dict[Split, Grid] = {"train": Grid.for_rows(tokens, min_shards=MIN_SHARDS * writers)}
    if held_out_tokens is None:
        held_out_tokens = min(math.ceil(tokens * held_out), MAX_HELD_OUT_ROWS)
    if held_out_tokens and held_out:
        # Shards of whole contexts: of several writers each has its own documents.
        grids["held_out"] = Grid.for_rows(
            held_out_tokens, min_shards=HELD_OUT_SHARDS, multiple=context if writers > 1 else 1
        )
    train = grids["train"]
    if writers > train.shards:
        raise UserError(
            f"--world {writers}: the store has {train.shards} shards of {train.shard_rows:,} "
            f"rows, fewer than writers. Ask for more --tokens or use fewer writers."
        )
    if ring is not None:
        if ring < 2 * writers:
            raise UserError(
                f"--ring {ring}: at least {2 * writers} shards are needed, two for each writer."
            )
        window = min(window, ring // (2 * writers))
    return CapturePlan(
        hookpoints=hookpoints,
        grids=grids,
        codec=codec,
        window=window,
        writers=writers,
        ring=ring,
        batch_rows=batch_rows,
    )


_MAX_PASSES = 8
"""Over text that coders are trained on again more often, nobody would take fewer tokens for as
many."""


def what_fits(plan: CapturePlan, free: int) -> list[str]:
    """Flags, with their numbers, each of which alone makes a capture fit into `free` bytes."""
    room = _DISK_SHARE * free
    train = plan.grids["train"]
    per_shard = sum(s.shard_bytes(train) for s in plan.specs("train").values())
    rest = plan.bytes - per_shard * min(train.shards, plan.ring or train.shards)
    fitting = int((room - rest) / per_shard) if room > rest else 0
    options = []
    if fitting >= 2 * plan.writers and plan.ring != fitting:
        options.append(f"--ring {fitting} (every row passes once, training runs at the same time)")
    rows = int(0.98 * train.rows * room / plan.bytes)
    passes = -(-train.rows // max(1, rows))
    if rows >= plan.batch_rows and plan.ring is None and passes <= _MAX_PASSES:
        options.append(f"--tokens {rows} (and {passes} epochs of training instead of one)")
    if plan.codec == "raw" and plan.bytes * 0.51 < room:
        options.append("--codec int8 (half the bytes, FVU of the rows about 1e-4)")
    count = len(plan.hookpoints)
    fewer = int(count * room / plan.bytes) if plan.bytes else count
    if 1 <= fewer < count:
        options.append(f"{fewer} of the {count} --hookpoints at a time")
    return options


def check_disk(where: str, plan: CapturePlan, free: int | None, written: int = 0) -> None:
    """See that a store fits.

    Args:
        where: the store, for the message.
        plan: of the capture.
        free: bytes, or None where there is no limit to see.
        written: bytes that are there already.

    Raises:
        UserError: it does not; the message names what would.
    """
    needed = plan.bytes - written
    if free is None or needed <= _DISK_SHARE * free:
        return
    options = what_fits(plan, free + written)
    would = f"What would fit: {'; '.join(options)}; or" if options else "It needs"
    raise UserError(
        f"--store {where}: the store needs {format_bytes(needed)}"
        f"{' more' if written else ''}, and the disk has {format_bytes(free)} free. {would} a "
        f"--store on a larger disk."
    )


def check_open_files(plan: CapturePlan) -> None:
    """Allow this process as many open files as the scatter needs.

    Raises:
        UserError: the system does not.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = plan.open_files() + 128  # libraries have some open, too
    if needed <= soft:
        return
    if hard != resource.RLIM_INFINITY and needed > hard:
        window = plan.open_shards() * max(0, hard - 256) // needed
        raise UserError(
            f"--hookpoints: scattering the rows of {len(plan.hookpoints)} hookpoints over "
            f"{plan.open_shards()} shards needs {needed:,} open files, and this system allows "
            f"{hard:,}. --window {max(1, window)} would fit; so would fewer hookpoints at a time, "
            f"or a higher limit (ulimit -n)."
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))

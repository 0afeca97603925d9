"""Shards against the manifest, the first time that they are read.

A shard that was changed on disk is rows like any others, and they end in figures. So a shard's size
and hash are compared with the manifest before its rows are given out: once for each open store,
not at every reading. XXH3 reads at the speed of the memory (benchmarks/records/check_*.md).
"""

from __future__ import annotations

import sys
import threading
from typing import Any, NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray

from bsc.cache.store.folder import StoreFolder
from bsc.cache.store.kinds import Split
from bsc.cache.store.layout import PROVENANCE, ArraySpec, shard_key
from bsc.cache.store.manifest import read_provenance, read_shard_hashes
from bsc.cache.store.scatter import owned_shards, window_sizes
from bsc.errors import StoreError

__all__ = ["ShardChecks"]

_FILE = np.dtype([("size", "u8"), ("high", "u8"), ("low", "u8")])


class _Window(NamedTuple):
    """Sizes and hashes of the shards of a window, in 24 bytes each: a run over a large store comes
    to hold those of all its windows."""

    arrays: dict[str, int]
    """Row of `files` by array."""
    shards: NDArray[np.int64]
    """Numbers of the shards, ascending."""
    files: NDArray[np.void]
    """(arrays, shards) of `_FILE`; size 0: the manifest has none."""

    @classmethod
    def of(cls, known: dict[tuple[str, int], tuple[int, str]]) -> _Window:
        """From what the manifest says, by array and shard."""
        arrays = {sys.intern(name): i for i, name in enumerate(dict.fromkeys(n for n, _ in known))}
        shards = np.unique(np.array([shard for _, shard in known], np.int64))
        files = np.zeros((len(arrays), len(shards)), _FILE)
        for (name, shard), (size, digest) in known.items():
            at = arrays[name], int(np.searchsorted(shards, shard))
            files[at] = size, int(digest[:16], 16), int(digest[16:], 16)
        return cls(arrays, shards, files)

    def get(self, array: str, shard: int) -> tuple[int, str] | None:
        """Size and hash of a shard; None where the manifest has none."""
        at = int(np.searchsorted(self.shards, shard))
        if array not in self.arrays or at == len(self.shards) or self.shards[at] != shard:
            return None
        size, high, low = self.files[self.arrays[array], at].tolist()
        return (size, f"{high:016x}{low:016x}") if size else None


class ShardChecks:
    """What the manifest says of the shards of a split, and which were compared with it."""

    def __init__(self, folder: StoreFolder, split: Split) -> None:
        """Nothing is read before the first shard is checked."""
        self.folder, self.split = folder, split
        self._done: set[tuple[str, int]] = set()
        self._known: dict[tuple[int, int], _Window] = {}
        self._ends: list[Any] | None = None
        self._lock = threading.Lock()

    def is_done(self, spec: ArraySpec, shard: int) -> bool:
        """Whether a shard was compared and found right."""
        return (spec.path, shard) in self._done

    def check(self, spec: ArraySpec, shard: int, content: Any) -> None:
        """Compare a shard with the manifest, unless that was done before.

        Args:
            spec: its array.
            shard: its number.
            content: the bytes of its file, or a function that gives them.

        Raises:
            StoreError: it is not the shard that was written, or the manifest is damaged.
        """
        if self.is_done(spec, shard):
            return
        raw = content() if callable(content) else content
        size, digest = self._expected(spec, shard)
        if len(raw) != size or xxhash.xxh3_128_hexdigest(raw) != digest:
            raise StoreError(
                f"{self.folder}/{shard_key(spec, shard)}: changed since it was written: its "
                f"{len(raw):,} bytes have not the hash that the manifest states. `bsc verify "
                f"{self.folder}` finds every damaged file; copy them again from where the store "
                f"is whole, or capture again. `bsc train` and `bsc eval` read it as it is with "
                f"--no-check."
            )
        self._done.add((spec.path, shard))

    def _expected(self, spec: ArraySpec, shard: int) -> tuple[int, str]:
        """Size and hash of a shard's file by the manifest."""
        with self._lock:
            if self._ends is None:
                self._ends = self._window_ends()
            rank = shard % len(self._ends)
            window = int(np.searchsorted(self._ends[rank], shard // len(self._ends), side="right"))
            if (rank, window) not in self._known:
                known = read_shard_hashes(self.folder, self.split, rank, window)
                self._known[rank, window] = _Window.of(known)
            found = self._known[rank, window].get(spec.path, shard)
        if found is None:
            raise StoreError(
                f"{self.folder}/{shard_key(spec, shard)}: the manifest has no line for this shard. "
                f"`bsc verify {self.folder}` says what else is wrong."
            )
        return found

    def _window_ends(self) -> list[Any]:
        """By writer: how many of its shards there are up to the end of each window."""
        provenance = read_provenance(self.folder)
        try:
            made = provenance["capture"]
            writers = int(made["writers"])
            shards = int(made["grids"][self.split]["shards"])
            window = int(made["window"]) if self.split == "train" else 1
        except (KeyError, TypeError, ValueError) as error:
            raise StoreError(f"{self.folder}/{PROVENANCE}: damaged ({error!r}).") from None
        ends = []
        for rank in range(writers):
            owned = len(owned_shards(shards, rank, writers))
            ends.append(np.cumsum(window_sizes(owned, window) if owned else []))
        return ends

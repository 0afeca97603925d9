"""Checking a store against its own record, every byte of it.

`verify` compares every file with the manifest and the metadata and gives problems in words that
name the file. A store is right when the list is empty. `verify_shards.py` reads the rows,
`verify_journal.py` keeps what was checked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from bsc.cache.store.channel_sums import ChannelSums
from bsc.cache.store.folder import PARTIAL
from bsc.cache.store.kinds import Split
from bsc.cache.store.layout import (
    DATA,
    MANIFEST,
    OVERLAP,
    PROVENANCE,
    README,
    ArraySpec,
    array_key,
    end_key,
    group_json,
    group_keys,
    shard_key,
    store_attributes,
    window_key,
)
from bsc.cache.store.manifest import PartEnd, WindowRecord, read_array_json, read_end, read_window
from bsc.cache.store.readme import store_readme
from bsc.cache.store.ring import first_kept, is_ring_file
from bsc.cache.store.scatter import owned_shards, window_sizes
from bsc.cache.store.shard import ShardRecord
from bsc.cache.store.split import StoreSplit
from bsc.cache.store.store import ActivationStore
from bsc.cache.store.verify_files import StoreFiles
from bsc.cache.store.verify_journal import VerifyJournal
from bsc.cache.store.verify_shards import ShardPool, WindowShards
from bsc.errors import StoreError, UserError
from bsc.files import canonical_json
from bsc.records import parse_json, sealed

__all__ = ["verify"]


def verify(
    root: str | Path,
    on_bytes: Callable[[int], None] = lambda n: None,
    *,
    quick: bool = False,
    jobs: int | None = None,
    journal: VerifyJournal | None = None,
) -> Iterator[str]:
    """Compare the files of a store with its manifest and metadata.

    Problems come in the same order whatever `jobs` is, and with a journal as without one. Memory
    does not grow with the store: a window of the manifest is looked at after the other.

    Args:
        root: the store's folder.
        on_bytes: called with the number of bytes checked since the last call. The number is
            negative where the journal counted bytes that have to be read again.
        quick: check names, sizes, indices and metadata, and not the rows.
        jobs: shards that are checked at a time; None: one for each core, at most 8.
        journal: what was checked before, which is not read again, and where to keep what is checked
            now. None: every byte is read.

    Yields:
        One sentence per problem: a missing, truncated, changed or foreign file, a manifest that
        fits no array, sums that do not match.

    Raises:
        StoreError: there is no store at all.
        UserError: `jobs` is less than 1, or a journal goes with `quick`.
    """
    if quick and journal is not None:
        raise UserError("A quick check reads no rows, so it keeps no journal: leave one out.")
    try:
        # In this order: what a capture commits meanwhile is then neither foreign nor missing.
        before = ActivationStore(root)
        specs = [spec for split in before.splits.values() for spec in split.specs.values()]
        complete, files = _is_complete(before), StoreFiles(before.folder, specs)
        store = ActivationStore(root)
    except StoreError as error:
        if not (Path(root) / PROVENANCE).exists() and not (Path(root) / DATA).exists():
            raise
        yield str(error)
        return
    with ShardPool(store, files, on_bytes, quick=quick, jobs=jobs, journal=journal) as pool:
        yield from _Check(store, complete, files, pool).run()


def _is_complete(store: ActivationStore) -> bool:
    try:
        return store.complete
    except StoreError:
        return False


class _Check:
    def __init__(
        self, store: ActivationStore, complete: bool, files: StoreFiles, pool: ShardPool
    ) -> None:
        self.store, self.pool = store, pool
        self.complete, self.files = complete, files
        """Whether the store was finished, and the files it had, when the check began."""
        self.folder = store.folder
        self.expected: set[str] = set()
        """Keys that belong to the store, but for those of shards."""
        self.optional: set[str] = set()
        """Keys that may be there while a capture goes on."""
        self.kept: dict[Split, int] = {}
        """First shard of each split that has to be there."""
        self.ends: list[PartEnd | None] = []

    def run(self) -> Iterator[str]:
        self.expected |= {PROVENANCE, README, f"{DATA}/zarr.json"}
        yield from self._words()
        yield from self._ends()
        for split in self.store.splits.values():
            yield from self._split(split)
        yield from self._files()

    def _words(self) -> Iterator[str]:
        """The files that hold no rows: provenance, README and group metadata."""
        try:
            provenance = self.store.provenance()
            expected = store_attributes(provenance["capture"])
            if not expected["store_id"] == self.store.store_id == provenance["store_id"]:
                yield (
                    f"{self.folder}/{PROVENANCE}: changed, or not the provenance of store "
                    f"{self.store.store_id}"
                )
            elif expected != self.store.attributes:
                wrong = [k for k in expected if self.store.attributes.get(k) != expected[k]]
                yield f"{self.folder}/{DATA}/zarr.json: {', '.join(wrong) or 'a key'} changed"
            root = group_json({"activation_store": expected})
            yield from self._same(f"{DATA}/zarr.json", canonical_json(root).encode())
            yield from self._same(PROVENANCE, sealed(provenance))
        except (StoreError, KeyError, TypeError, ValueError, AttributeError) as error:
            yield f"{self.folder}/{PROVENANCE}: cannot be checked ({error!r})"
        yield from self._overlap()
        readme = store_readme(self.store.codec, self.store.hookpoints[0].name)
        yield from self._same(README, readme.encode())
        for split in self.store.splits.values():
            for key in group_keys(split.specs.values()):
                self.expected.add(key)
                yield from self._same(key, canonical_json(group_json({})).encode())

    def _overlap(self) -> Iterator[str]:
        """What the capture measured last, which a finished store with held-out rows has."""
        self.optional.add(OVERLAP)  # written before provenance.json says so
        try:
            if self.store.overlap is not None:
                self.expected.add(OVERLAP)
                if self.folder.exists(OVERLAP):  # else named with the other missing files
                    self.store.seen_rows()
        except (StoreError, KeyError, TypeError, ValueError, AttributeError) as error:
            yield str(error)

    def _same(self, key: str, content: bytes) -> Iterator[str]:
        """A file has this content; a missing one is reported with the other missing ones."""
        try:
            if self.folder.read(key) != content:
                yield f"{self.folder}/{key}: changed"
        except FileNotFoundError:
            return

    def _ends(self) -> Iterator[str]:
        for rank in range(self.store.writers):
            end = None
            try:
                end = read_end(self.folder, rank)
            except StoreError as error:
                yield str(error)
            self.ends.append(end)
            if end is not None:
                self.expected.add(end_key(rank))
            else:
                self.optional.add(end_key(rank))
                if self.complete:
                    yield f"{self.folder}/{end_key(rank)}: missing or damaged"
        # Killed at its very end, a finished capture leaves these; they hold nothing.
        self.optional |= {"store.lock"}
        self.optional |= {f"writer-{rank}.lock" for rank in range(self.store.writers)}

    def _windows(self, split: StoreSplit, rank: int) -> Iterator[WindowRecord | str]:
        """The manifests of a writer, with the problem in the place of one that is damaged."""
        for window in count():
            key = window_key(split.split, rank, window)
            try:
                record = read_window(self.folder, split.split, rank, window)
            except StoreError as error:
                self.expected.add(key)
                yield str(error)
                if window >= self._least_windows(split, rank) and key not in self.files.others:
                    break  # nothing is there, and the place cannot be read
                continue
            if record is None and window >= self._least_windows(split, rank):
                break
            self.expected.add(key)
            if record is not None:
                yield record

    def _least_windows(self, split: StoreSplit, rank: int) -> int:
        """Windows that a writer must have committed, by the shards that are."""
        try:
            made = self.store.provenance()["capture"]
            shards = int(made["grids"][split.split]["shards"])
            width = int(made["window"]) if split.split == "train" else 1
        except (StoreError, KeyError, TypeError, ValueError):
            return 0  # reported with the provenance
        committed = len(owned_shards(split.shards, rank, self.store.writers))
        owned = owned_shards(shards, rank, self.store.writers)
        sizes = window_sizes(len(owned), width) if len(owned) else []
        return int(np.searchsorted(np.cumsum(sizes), committed)) + 1 if committed else 0

    def _split(self, split: StoreSplit) -> Iterator[str]:
        ring = self.store.ring is not None and split.split == "train"
        first = next(iter(split.specs.values()))
        self.kept[split.split] = first_kept(self.folder, first, split.shards) if ring else 0
        for name, spec in split.specs.items():
            self.expected.add(array_key(spec))
            yield from self._metadata(split, name, spec)
        sums = {s.path: ChannelSums(s.width) for s in split.specs.values() if s.width is not None}
        yield from self.pool.problems(self._shards(split, sums))
        for name, spec in split.specs.items():
            # Of an array that has no sums here, a shard without a line was reported.
            if spec.path in sums and sums[spec.path].to_json() != split.sums(name).to_json():
                yield f"{self.folder}/{array_key(spec)}: the channel sums are changed"

    def _shards(
        self, split: StoreSplit, sums: dict[str, ChannelSums]
    ) -> Iterator[str | WindowShards]:
        """Every window at its first shard, shards without a line, and manifests that are wrong.

        The shards are gone through in order, with one window of each writer in memory.

        Args:
            split: whose shards they are.
            sums: of each array, to which those of its shards are added in order. An array goes from
                there if a shard of it has none.
        """
        shard_rows = split.grid.shard_rows
        ends = {s.path: split.summed_rows(n) // shard_rows for n, s in split.specs.items()}
        parts = [self._windows(split, rank) for rank in range(self.store.writers)]
        lines: list[dict[tuple[str, int], ShardRecord]] = [{} for _ in parts]
        last = [-1] * len(parts)
        for shard in range(max(ends.values())):
            rank = shard % len(parts)
            while last[rank] < shard:
                window = next(parts[rank], None)
                if isinstance(window, WindowRecord):
                    yield from self._window(split, window)
                    lines[rank] = {(line.array, line.shard): line for line in window.shards}
                    last[rank] = max(window.shard_numbers, default=-1)
                elif window is None:
                    lines[rank], last[rank] = {}, max(ends.values())
                else:
                    yield window
            for spec in split.specs.values():
                line = lines[rank].pop((spec.path, shard), None)
                if line is None and self.kept[split.split] <= shard < split.shards:
                    key = shard_key(spec, shard)
                    yield f"{self.folder}/{key}: committed, but the manifest has no line for it"
                if spec.path in sums and shard < ends[spec.path]:
                    if line is None or line.sums is None:
                        del sums[spec.path]
                    else:
                        sums[spec.path].merge(line.sums)
        for part in parts:  # what is committed, but not yet by all writers
            for window in part:
                if isinstance(window, WindowRecord):
                    yield from self._window(split, window)
                else:
                    yield window

    def _window(self, split: StoreSplit, window: WindowRecord) -> Iterator[str | WindowShards]:
        """The shards of a window that have to be there, and lines of other arrays."""
        specs = {spec.path: (at, spec) for at, spec in enumerate(split.specs.values())}
        found: dict[tuple[int, int], tuple[ArraySpec, ShardRecord]] = {}
        for line in window.shards:
            at, spec = specs.get(line.array, (0, None))
            if spec is None:
                yield f"{self.folder}/{MANIFEST}: a line for {line.array}, which is no array"
            elif self.kept[split.split] <= line.shard < split.shards:
                found[line.shard, at] = (spec, replace(line, sums=None))
        if found:
            shards = [found[place] for place in sorted(found)]
            yield WindowShards(split.split, window.rank, window.window, shards)

    def _metadata(self, split: StoreSplit, name: str, spec: ArraySpec) -> Iterator[str]:
        """The array's own file is canonical and agrees with what the parts of the store say."""
        key = array_key(spec)
        raw = self.folder.read(key)
        try:
            _, attributes = read_array_json(self.folder, spec)
        except StoreError as error:
            yield str(error)
            return
        if raw != canonical_json(parse_json(raw)).encode():
            yield f"{self.folder}/{key}: changed"
        provenance: dict[str, Any] = {}
        try:
            provenance = self.store.provenance()
            grid = provenance["capture"]["grids"][split.split]
            if (split.grid.shard_rows, split.grid.chunk_rows) != (
                grid["shard_rows"],
                grid["chunk_rows"],
            ):
                yield f"{self.folder}/{key}: another grid than {PROVENANCE} says"
        except (StoreError, KeyError, TypeError):
            return  # reported with the provenance
        own = provenance.get("array_attributes", {}).get(name, {})
        if {k: v for k, v in attributes.items() if k in own} != own:
            yield f"{self.folder}/{key}: {', '.join(own)} changed"
        said = provenance.get("completed") if self.complete else None
        rows = split.summed_rows(name)
        if said and said.get("rows", {}).get(split.split) != rows:
            yield f"{self.folder}/{key}: {rows:,} rows, which is not what {PROVENANCE} says"

    def _files(self) -> Iterator[str]:
        """Nothing is missing, and nothing else is there."""
        foreign = {k for k in self.files.others if not self._of_a_running_capture(k)}
        foreign -= self.expected | self.optional
        for split in self.store.splits.values():
            if not self.complete:
                break  # shards beyond the committed ones are those of a running capture
            for spec in split.specs.values():
                there = self.files.shards(spec)
                foreign |= {shard_key(spec, int(n)) for n in there[there >= split.shards]}
        for key in sorted(foreign):
            yield f"{self.folder}/{key}: does not belong to the store"
        for key in sorted(self.expected - self.files.others):
            # Missing shards are reported above; others may have come since the check began.
            if not self.folder.exists(key):
                yield f"{self.folder}/{key}: missing"

    def _of_a_running_capture(self, key: str) -> bool:
        """Whether a file is what a capture leaves on its way: its next shards, and temporaries."""
        if self.store.ring and is_ring_file(key):
            return True
        if self.complete:
            return False
        if key.endswith(PARTIAL):
            return True
        for split in self.store.splits.values():
            for spec in split.specs.values():
                rest = key.removeprefix(f"{DATA}/{spec.path}/c/")
                if rest != key:
                    number = rest.split("/")[0]
                    return number.isdigit() and int(number) >= split.shards
        return False

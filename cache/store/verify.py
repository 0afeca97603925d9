"""Checking a store against its own record, every byte of it.

`verify` compares every file with the manifest and the metadata and gives problems in words that
name the file. A store is right when the list is empty.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from bsc.cache.store.channel_sums import ChannelSums
from bsc.cache.store.folder import PARTIAL
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
from bsc.cache.store.shard import ShardRecord, read_index
from bsc.cache.store.split import StoreSplit
from bsc.cache.store.store import ActivationStore
from bsc.errors import StoreError
from bsc.files import canonical_json
from bsc.records import parse_json, sealed

__all__ = ["verify"]

_READ = 1 << 24


def verify(
    root: str | Path, on_bytes: Callable[[int], None] = lambda n: None, *, quick: bool = False
) -> Iterator[str]:
    """Compare the files of a store with its manifest and metadata.

    Args:
        root: the store's folder.
        on_bytes: called with the number of bytes checked since the last call.
        quick: check names, sizes, indices and metadata, and not the rows.

    Yields:
        One sentence per problem: a missing, truncated, changed or foreign file, a manifest that
        fits no array, sums that do not match.

    Raises:
        StoreError: there is no store at all.
    """
    try:
        # In this order: what a capture commits meanwhile is then neither foreign nor missing.
        before = ActivationStore(root)
        complete, found = _is_complete(before), set(before.folder.keys())
        store = ActivationStore(root)
    except StoreError as error:
        if not (Path(root) / PROVENANCE).exists() and not (Path(root) / DATA).exists():
            raise
        yield str(error)
        return
    yield from _Check(store, complete, found, on_bytes, quick).run()


def _is_complete(store: ActivationStore) -> bool:
    try:
        return store.complete
    except StoreError:
        return False


class _Check:
    def __init__(
        self,
        store: ActivationStore,
        complete: bool,
        found: set[str],
        on_bytes: Callable[[int], None],
        quick: bool,
    ) -> None:
        self.store, self.on_bytes, self.quick = store, on_bytes, quick
        self.complete, self.found = complete, found
        """Whether the store was finished, and the files it had, when the check began."""
        self.folder = store.folder
        self.expected: set[str] = set()
        """Keys that belong to the store."""
        self.optional: set[str] = set()
        """Keys that may be there while a capture goes on."""
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

    def _windows(self, split: StoreSplit) -> Iterator[tuple[WindowRecord | None, str]]:
        """The manifests of a split with the problem of each, writer by writer."""
        for rank in range(self.store.writers):
            for window in count():
                key = window_key(split.split, rank, window)
                try:
                    record = read_window(self.folder, split.split, rank, window)
                except StoreError as error:
                    self.expected.add(key)
                    yield None, str(error)
                    continue
                if record is None and window >= self._least_windows(split, rank):
                    break
                self.expected.add(key)
                if record is not None:
                    yield record, ""

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
        records: dict[tuple[str, int], ShardRecord] = {}
        sums: dict[str, dict[int, ChannelSums]] = {}
        for window, problem in self._windows(split):
            if window is None:
                yield problem
                continue
            for record in window.shards:
                if record.sums is not None:
                    sums.setdefault(record.array, {})[record.shard] = record.sums
                records[record.array, record.shard] = replace(record, sums=None)
        first = next(iter(split.specs.values()))
        kept = first_kept(self.folder, first, split.shards) if self.store.ring else 0
        if split.split != "train":
            kept = 0
        for name, spec in split.specs.items():
            self.expected.add(array_key(spec))
            yield from self._metadata(split, name, spec)
            for shard in range(kept, split.shards):
                key = shard_key(spec, shard)
                self.expected.add(key)
                found = records.get((spec.path, shard))
                if found is None:
                    yield f"{self.folder}/{key}: committed, but the manifest has no line for it"
                else:
                    yield from self._shard(key, split, spec, found)
            if spec.width is not None:
                yield from self._sums(split, name, spec, sums.get(spec.path, {}))
        committed = {spec.path for spec in split.specs.values()}
        for array, shard in records:
            if array not in committed:
                yield f"{self.folder}/{MANIFEST}: a line for {array}, which is no array"
            elif shard >= split.shards and not self.complete:
                spec = next(s for s in split.specs.values() if s.path == array)
                self.optional.add(shard_key(spec, shard))

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

    def _shard(
        self, key: str, split: StoreSplit, spec: ArraySpec, record: ShardRecord
    ) -> Iterator[str]:
        grid, where = split.grid, f"{self.folder}/{key}"
        if record.rows != grid.shard_rows:
            yield f"{where}: the manifest says {record.rows} rows"
        try:
            size = self.folder.size(key)
            if size is None:
                if not self._passed(record.shard, split):
                    yield f"{where}: missing"
                return
            if size != record.bytes or (not spec.lz4 and size != spec.shard_bytes(grid)):
                yield f"{where}: {size:,} bytes, expected {record.bytes:,}"
                return
            path = self.folder.fresh(key)
            index = read_index(path, grid.chunks)
            lengths = index[:, 1].astype(np.int64)
            starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
            dense = np.array_equal(index[:, 0].astype(np.int64), starts)
            if not dense or int(lengths.sum()) + index.nbytes + 4 != size:
                yield f"{where}: the chunks are not in order and without gaps"
                return
            if self.quick:
                self.on_bytes(size)
                return
            yield from self._content(path, where, lengths.tolist(), split, record)
        except (StoreError, OSError) as error:
            if not self._passed(record.shard, split):
                yield str(error)

    def _passed(self, shard: int, split: StoreSplit) -> bool:
        """Whether a ring has moved past a shard since the check began."""
        first = next(iter(split.specs.values()))
        ring = self.store.ring is not None and split.split == "train"
        return ring and shard < first_kept(self.folder, first, split.shards)

    def _content(
        self, path: Path, where: str, lengths: list[int], split: StoreSplit, record: ShardRecord
    ) -> Iterator[str]:
        whole = xxhash.xxh3_128()
        damaged = []
        with path.open("rb") as file:
            for chunk, length in enumerate(lengths):
                digest = xxhash.xxh3_64()
                left = length
                while left and (raw := file.read(min(left, _READ))):
                    digest.update(raw)
                    whole.update(raw)
                    left -= len(raw)
                    self.on_bytes(len(raw))
                if record.chunk_xxh3_64[chunk : chunk + 1] != (digest.hexdigest(),):
                    damaged.append(chunk)
            whole.update(file.read())
        for chunk in damaged:
            n = split.grid.chunk_rows
            yield f"{where}: chunk {chunk} (rows {chunk * n} to {chunk * n + n - 1}) is changed"
        if whole.hexdigest() != record.xxh3_128 and not damaged:
            yield f"{where}: the footer is changed"

    def _sums(
        self, split: StoreSplit, name: str, spec: ArraySpec, by_shard: dict[int, ChannelSums]
    ) -> Iterator[str]:
        """The sums in an array's attributes are those of its manifests, added up in order."""
        total = ChannelSums(int(spec.width or 0))
        for shard in range(split.summed_rows(name) // split.grid.shard_rows):
            if shard not in by_shard:
                return  # reported as a shard without a line
            total.merge(by_shard[shard])
        if total.to_json() != split.sums(name).to_json():
            yield f"{self.folder}/{array_key(spec)}: the channel sums are changed"

    def _files(self) -> Iterator[str]:
        """Nothing is missing, and nothing else is there."""
        for key in sorted(self.found - self.expected - self.optional):
            if self._of_a_running_capture(key):
                continue
            yield f"{self.folder}/{key}: does not belong to the store"
        for key in sorted(self.expected - self.found):
            # Missing shards are reported above; others may have come since the check began.
            if "/c/" not in key and not self.folder.exists(key):
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

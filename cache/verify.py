"""Checking a store against its own record: every byte of every shard, and nothing foreign.

`verify` reads everything at the speed of the disk and reports each problem in words that name the
file. A store is right when the list is empty.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import xxhash

from bsc.cache.layout import (
    DATA,
    MANIFEST,
    PROVENANCE,
    group_json,
    shard_path,
    store_attributes,
)
from bsc.cache.readme import STORE_README
from bsc.cache.shard import ChannelSums, ShardRecord, map_shard
from bsc.cache.store import ActivationStore, StoreSplit
from bsc.errors import StoreError
from bsc.files import canonical_json

__all__ = ["verify"]

_READ = 1 << 24


def verify(
    root: str | Path, on_bytes: Callable[[int], None] = lambda n: None
) -> Iterator[str]:  # fmt: skip
    """Compare the files of a store with its manifest and metadata.

    Args:
        root: the store's folder.
        on_bytes: called with the number of bytes read since the last call.

    Yields:
        One sentence per problem: a missing, truncated, changed or foreign file, a line of the
        manifest that fits no array, sums that do not match.

    Raises:
        StoreError: there is no store that could be read at all.
    """
    store = ActivationStore(root)
    records: dict[tuple[str, int], ShardRecord] = {}
    totals: dict[str, ChannelSums] = {}
    try:
        for record in store.records():
            key = (record.array, record.shard)
            if key in records:
                yield f"{MANIFEST}: two lines for shard {record.shard} of {record.array}"
            records[key] = replace(record, sums=None)
            _add_sums(store, totals, record)
    except StoreError as error:
        yield str(error)
    yield from _check_words(store)
    expected = {store.root / n for n in (MANIFEST, PROVENANCE, "README.md")}
    expected.add(store.root / DATA / "zarr.json")
    for split in store.splits.values():
        for name, spec in split.specs.items():
            array = store.root / DATA / spec.path
            expected.add(array / "zarr.json")
            expected |= {
                store.root / DATA / p / "zarr.json" for p in list(Path(spec.path).parents)[:-1]
            }
            for shard in range(split.shards):
                path = shard_path(store.root, spec, shard)
                expected.add(path)
                found = records.pop((spec.path, shard), None)
                if found is None:
                    yield f"{path}: committed, but {MANIFEST} has no line for it"
                else:
                    yield from _check_shard(path, split, name, found, on_bytes)
        yield from _check_sums(store, split, totals)
    for array_path, shard in records:
        yield f"{MANIFEST}: a line for shard {shard} of {array_path}, which is not committed"
    for path in sorted(p for p in store.root.rglob("*") if p.is_file() or p.is_symlink()):
        if path not in expected:
            yield f"{path}: does not belong to the store"
    for path in sorted(p for p in expected if not p.exists() and p.name != "0"):
        if path.parent.name != "c":  # missing shards are reported above
            yield f"{path}: missing"


def _check_shard(
    path: Path,
    split: StoreSplit,
    name: str,
    record: ShardRecord,
    on_bytes: Callable[[int], None],
) -> Iterator[str]:
    spec = split.spec(name)
    chunk_bytes = split.grid.chunk_rows * spec.row_bytes
    if record.rows != split.grid.shard_rows:
        yield f"{MANIFEST}: shard {record.shard} of {record.array} has {record.rows} rows"
    try:
        if path.stat().st_size != record.bytes:
            yield f"{path}: {path.stat().st_size:,} bytes, expected {record.bytes:,}"
            return
        whole = xxhash.xxh3_128()
        damaged = []
        with path.open("rb") as file:
            for chunk in range(split.grid.chunks):
                digest = xxhash.xxh3_64()
                left = chunk_bytes
                while left:
                    raw = file.read(min(left, _READ))
                    if not raw:
                        break
                    digest.update(raw)
                    whole.update(raw)
                    left -= len(raw)
                    on_bytes(len(raw))
                listed = record.chunk_xxh3_64[chunk : chunk + 1]
                if (digest.hexdigest(),) != listed:
                    damaged.append(chunk)
            footer = file.read()
            whole.update(footer)
        for chunk in damaged:
            rows = (chunk * split.grid.chunk_rows, (chunk + 1) * split.grid.chunk_rows)
            yield f"{path}: chunk {chunk} (rows {rows[0]} to {rows[1] - 1} of the shard) is changed"
        if whole.hexdigest() != record.xxh3_128 and not damaged:
            yield f"{path}: the footer is changed"
        map_shard(path, spec, split.grid)
    except FileNotFoundError:
        yield f"{path}: missing"
    except (StoreError, OSError) as error:
        yield str(error)


def _add_sums(store: ActivationStore, totals: dict[str, ChannelSums], record: ShardRecord) -> None:
    """Add a line's sums to the total of its array, if it is one of the shards that has them."""
    for split in store.splits.values():
        for name, spec in split.specs.items():
            if spec.path != record.array or record.sums is None:
                continue
            if record.shard < split.summed_rows(name) // split.grid.shard_rows:
                total = totals.setdefault(spec.path, ChannelSums(record.sums.width))
                total.merge(record.sums)


def _check_sums(
    store: ActivationStore, split: StoreSplit, totals: dict[str, ChannelSums]
) -> Iterator[str]:
    """The sums in an array's attributes are those of its lines of the manifest, in order."""
    for name, spec in split.specs.items():
        if spec.width is None:
            continue
        total = totals.get(spec.path, ChannelSums(spec.width))
        if total.to_json() != split.sums(name).to_json():
            yield f"{store.root / DATA / spec.path / 'zarr.json'}: the channel sums are changed"


def _check_words(store: ActivationStore) -> Iterator[str]:
    """The files that hold no rows: provenance, README and group metadata."""
    path = store.root / PROVENANCE
    try:
        made = store.provenance()["capture"]
        expected = store_attributes(made)
        if expected["store_id"] != store.store_id:
            yield f"{path}: changed, or not the provenance of store {store.store_id}"
        elif expected != store.attributes:
            wrong = [k for k in expected if store.attributes.get(k) != expected[k]]
            yield f"{store.root / DATA / 'zarr.json'}: {', '.join(wrong)} changed"
    except (StoreError, KeyError, TypeError) as error:
        yield f"{path}: cannot be checked ({error})"
    readme = store.root / "README.md"
    if readme.exists() and readme.read_text(errors="replace") != STORE_README:
        yield f"{readme}: changed"
    groups = {
        parent
        for split in store.splits.values()
        for spec in split.specs.values()
        for parent in list(Path(spec.path).parents)[:-1]
    }
    for group in sorted(groups):
        meta = store.root / DATA / group / "zarr.json"
        if meta.exists() and meta.read_bytes() != canonical_json(group_json({})).encode():
            yield f"{meta}: changed"

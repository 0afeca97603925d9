"""The life of a store on disk: made whole, grown by commits, finished by the last writer.

No coordinator: every step is a function of the files, safe to repeat, and taken under the store's
lock, so any number of writers on any machines that share the folder can take it at any time.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import numpy as np

from bsc.cache.capture.overlap import measure_overlap
from bsc.cache.capture.writer import SplitStart
from bsc.cache.store.channel_sums import ChannelSums
from bsc.cache.store.folder import StoreFolder
from bsc.cache.store.kinds import Split
from bsc.cache.store.layout import (
    DATA,
    OVERLAP,
    PROVENANCE,
    README,
    ArraySpec,
    Grid,
    array_key,
    group_json,
    group_keys,
    shard_key,
)
from bsc.cache.store.manifest import (
    committed_windows,
    read_array_json,
    read_end,
    read_provenance,
    read_shard_hashes,
    read_window,
)
from bsc.cache.store.readme import store_readme
from bsc.cache.store.scatter import owned_shards, window_sizes
from bsc.cache.store.store import ActivationStore
from bsc.errors import StoreError, UserError
from bsc.files import canonical_json
from bsc.records import sealed

__all__ = ["advance", "complete", "create", "differences", "split_start"]


def create(
    folder: StoreFolder,
    arrays: Mapping[Split, tuple[Mapping[str, ArraySpec], Grid]],
    attributes: Mapping[str, Any],
    provenance: Mapping[str, Any],
    array_attributes: Mapping[str, Mapping[str, Any]],
) -> None:
    """Lay out an empty store, or leave the one that is there: whole, in one step.

    Args:
        folder: where.
        arrays: the arrays of each split and their grid.
        attributes: what readers need, for the root group of data.zarr.
        provenance: how the store is made, for provenance.json.
        array_attributes: by short name of an array, what it has beside its sums.
    """
    files: dict[str, Any] = {
        f"{DATA}/zarr.json": group_json({"activation_store": dict(attributes)}),
    }
    for specs, grid in arrays.values():
        files |= {key: group_json({}) for key in group_keys(specs.values())}
        for name, spec in specs.items():
            own = dict(array_attributes.get(name, {}))
            if spec.width is not None:
                own |= ChannelSums(spec.width).to_json()
            files[array_key(spec)] = spec.zarr_json(0, grid, own)
    texts = {key: canonical_json(value).encode() for key, value in files.items()}
    own_attributes = {name: dict(own) for name, own in array_attributes.items()}
    texts[PROVENANCE] = sealed({**provenance, "array_attributes": own_attributes})
    readme = store_readme(attributes["codec"], attributes["hookpoints"][0]["name"])
    folder.create({README: readme.encode()} | texts)


def differences(made: Any, asked: Any, path: str = "") -> list[str]:
    """Where two values of JSON differ, as sentences.

    >>> differences({"seed": 0, "a": {"b": 1}}, {"seed": 1, "a": {"b": 1}})
    ['seed is 0, asked for is 1']
    """
    if isinstance(made, dict) and isinstance(asked, dict):
        return [
            line
            for key in sorted(made.keys() | asked.keys())
            for line in differences(
                made.get(key), asked.get(key), f"{path}.{key}" if path else str(key)
            )
        ]
    if made == asked:
        return []
    return [f"{path} is {json.dumps(made)}, asked for is {json.dumps(asked)}"]


def check_same(folder: StoreFolder, identity: Mapping[str, Any]) -> dict[str, Any]:
    """See that the store in a folder is the one that a capture would make.

    Returns:
        Its provenance.

    Raises:
        UserError: it is another one; the message names what differs.
        StoreError: there is none that can be read.
    """
    provenance = read_provenance(folder)
    wrong = differences(provenance["capture"], json.loads(canonical_json(dict(identity))))
    # What follows from other settings is named only where nothing else differs.
    wrong = [w for w in wrong if not w.startswith(("grids.", "batch_contexts "))] or wrong
    if wrong:
        raise UserError(
            f"--store {folder}: holds a store of another capture: {'; '.join(wrong[:4])}"
            f"{f' and {len(wrong) - 4} more' if len(wrong) > 4 else ''}. Name another folder, or "
            f"give the command that began it to go on with it."
        )
    return provenance


def _shards_of(folder: StoreFolder, split: Split, rank: int, sizes: list[int], windows: int) -> int:
    """Shards in the first windows of a writer. Only the last can be shorter than planned.

    Raises:
        StoreError: the manifest of the last is missing or damaged.
    """
    if windows == 0:
        return 0
    # Not read_window: its megabytes of sums would take most of the time of a commit.
    last = read_shard_hashes(folder, split, rank, windows - 1)
    if not last:
        raise StoreError(f"{folder}: the manifest of {split} lacks a window of writer {rank}.")
    return sum(sizes[: windows - 1]) + len({shard for _, shard in last})


def split_start(
    folder: StoreFolder, split: Split, grid: Grid, rank: int, writers: int, window: int
) -> SplitStart:
    """What a writer has committed, from the manifest."""
    windows = committed_windows(folder, split, writers)[rank]
    if windows == 0:
        return SplitStart()
    sizes = window_sizes(len(owned_shards(grid.shards, rank, writers)), window)
    shards = _shards_of(folder, split, rank, sizes, windows)
    last = read_window(folder, split, rank, windows - 1)
    assert last is not None
    return SplitStart(windows, shards, last.next, last.dropped)


def advance(
    folder: StoreFolder,
    split: Split,
    specs: Mapping[str, ArraySpec],
    grid: Grid,
    *,
    writers: int,
    window: int,
) -> int:
    """Move `shape` of every array to the end of the committed shards without a gap.

    Returns:
        Committed shards of the split, over all writers, up to the first that is missing.
    """
    with folder.locked():
        return _advance(folder, split, specs, grid, writers=writers, window=window)


def _advance(
    folder: StoreFolder,
    split: Split,
    specs: Mapping[str, ArraySpec],
    grid: Grid,
    *,
    writers: int,
    window: int,
) -> int:
    """`advance`, for those who hold the lock."""
    counts = committed_windows(folder, split, writers)
    plans = [
        window_sizes(len(owned), window) if (owned := owned_shards(grid.shards, r, writers)) else []
        for r in range(writers)
    ]
    done = [
        _shards_of(folder, split, r, plan, n)
        for r, (plan, n) in enumerate(zip(plans, counts, strict=True))
    ]
    prefix = min(grid.shards, *(r + writers * n for r, n in enumerate(done)))
    known: dict[tuple[str, int], ChannelSums | None] = {}

    def sums_of(spec: ArraySpec, shard: int) -> ChannelSums:
        if (spec.path, shard) not in known:
            rank, place = shard % writers, shard // writers
            window = int(np.searchsorted(np.cumsum(plans[rank]), place, side="right"))
            record = read_window(folder, split, rank, window)
            known.update({(r.array, r.shard): r.sums for r in record.shards} if record else {})
        found = known.get((spec.path, shard))
        if found is None:
            raise StoreError(f"{folder}: the manifest lacks shard {shard} of {spec.path}.")
        return found

    for spec in specs.values():
        rows, attributes = read_array_json(folder, spec)
        before = rows // grid.shard_rows
        if before >= prefix:
            continue
        if spec.width is not None:
            sums = ChannelSums.from_json(attributes)
            for shard in range(before, prefix):
                sums.merge(sums_of(spec, shard))
            attributes |= sums.to_json()
        rows = prefix * grid.shard_rows
        new = spec.zarr_json(rows, grid, attributes)
        folder.write_text(array_key(spec), canonical_json(new))
    return prefix


def complete(
    folder: StoreFolder,
    arrays: Mapping[Split, tuple[Mapping[str, ArraySpec], Grid]],
    windows: Mapping[Split, int],
    *,
    writers: int,
) -> tuple[bool, dict[Split, int]]:
    """Move `shape` of every split, and finish the store if every writer's part is finished.

    Shards that lie beyond a gap, because another writer's text ended before, are removed: no reader
    could ever see them. Safe to repeat.

    Args:
        folder: the store.
        arrays: as for `create`.
        windows: shards that each split is scattered over at a time.
        writers: in all.

    Returns:
        Whether the store is finished, and the committed shards of each split.
    """
    with folder.locked():
        # Ends first: what they say is committed is then there to be counted.
        ends = [read_end(folder, rank) for rank in range(writers)]
        committed = {
            split: _advance(folder, split, specs, grid, writers=writers, window=windows[split])
            for split, (specs, grid) in arrays.items()
        }
        if any(end is None for end in ends):
            return False, committed
        provenance = read_provenance(folder)
        stranded: dict[Split, int] = {}
        for split, (specs, grid) in arrays.items():
            beyond = [
                shard
                for end in ends
                if end is not None
                for shard in owned_shards(grid.shards, end.rank, writers)[
                    : end.rows.get(split, 0) // grid.shard_rows
                ]
                if shard >= committed[split]
            ]
            for shard in beyond:
                for spec in specs.values():
                    folder.delete(shard_key(spec, shard))
            stranded[split] = len(beyond) * grid.shard_rows
    if "completed" not in provenance:
        dropped = {
            split: sum(end.dropped.get(split, 0) for end in ends if end) + stranded[split]
            for split in arrays
        }
        completed = {
            "rows": {s: committed[s] * grid.shard_rows for s, (_, grid) in arrays.items()},
            "dropped_rows": dropped,
            "text_ended": any(end.text_ended for end in ends if end),
            "at": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        if errors := _stored_errors(folder, arrays):
            completed["fvu_of_stored_rows"] = errors
        # Not under the lock, which is for moments: the n-grams of all rows are read.
        overlap = measure_overlap(ActivationStore(folder.address))
        if overlap is not None:
            completed["overlap"] = overlap.to_json()
        with folder.locked():
            if "completed" not in read_provenance(folder):
                if overlap is not None:
                    folder.write(OVERLAP, overlap.bits())
                folder.write(PROVENANCE, sealed(provenance | {"completed": completed}))
    folder.drop_locks(writers)
    return True, committed


def _stored_errors(
    folder: StoreFolder, arrays: Mapping[Split, tuple[Mapping[str, ArraySpec], Grid]]
) -> dict[str, dict[str, float]]:
    """What a lossy codec lost, by array of the training split: FVU, total and median channel.

    Squared error of the stored rows over squared deviation of the captured ones from their mean.
    """
    found = {}
    for name, spec in arrays["train"][0].items():
        if spec.width is None:
            continue
        rows, attributes = read_array_json(folder, spec)
        sums = ChannelSums.from_json(attributes)
        rows -= sums.non_finite_rows
        if sums.sum_sq_error is None or rows < 1:
            continue
        deviation = np.maximum(sums.sum_sq - sums.sum**2 / rows, 0.0)
        varying = deviation > 0
        found[name] = {
            "total": float(sums.sum_sq_error.sum() / max(deviation.sum(), 1e-300)),
            "median_channel": float(
                np.median(sums.sum_sq_error[varying] / deviation[varying]) if varying.any() else 0.0
            ),
        }
    return found

"""Which rows of a split are read, and the moments of those.

Rows of chosen tokens can be left out, and rows with values that are not finite always are.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import torch
from numpy.typing import NDArray

from bsc.cache.store.ring import first_kept
from bsc.cache.store.split import Moments, StoreSplit
from bsc.errors import StoreError

__all__ = ["kept_count", "kept_moments", "kept_rows"]

MOMENT_ROWS = 1 << 20
"""Rows that the moments are taken over where the sums of the store do not serve: shards hold rows
at random, so some shards are a sample."""
_LEAST_SHARDS = 8
"""Shards whose counts tell how much shards differ."""
_AT_ONCE = 8192


def kept_rows(
    split: StoreSplit, shard: int, names: Collection[str], without_tokens: Collection[int]
) -> NDArray[np.bool_] | None:
    """Which rows of a shard are read, (shard_rows,); None: all of them.

    Args:
        split: the rows.
        shard: which shard.
        names: activation arrays that are read; a row is left out if one of them is not finite.
        without_tokens: token ids whose rows are left out.
    """
    damaged = [name for name in names if split.non_finite_rows(name)]
    if not damaged and not without_tokens:
        return None
    kept = np.ones(split.grid.shard_rows, bool)
    if without_tokens:
        unwanted = np.array(sorted(without_tokens), np.uint32)
        kept &= ~np.isin(split.shard("tokens/token_id", shard), unwanted)
    for name in damaged:
        rows = split.shard_rows(name, shard)
        for start in range(0, len(kept), _AT_ONCE):
            part = rows.part(start, min(start + _AT_ONCE, len(kept)))
            kept[start : start + len(part)] &= part.isfinite().all(dim=1).numpy()
    return kept


def kept_count(split: StoreSplit, without_tokens: Collection[int]) -> int:
    """How many finite rows are read where rows of some tokens are left out.

    Of more than a million rows an estimate, from shards that lie evenly over the split, and so
    small (four standard errors, of the counts of shards) that there are most likely as many.

    Raises:
        StoreError: none is left.
    """
    if not without_tokens or not split.rows:
        return split.rows
    wanted = max(_LEAST_SHARDS, -(-MOMENT_ROWS // split.grid.shard_rows))
    if wanted < split.shards:
        places = np.linspace(0, split.shards - 1, wanted).round().astype(int).tolist()
        counts = np.array([_count(split, shard, without_tokens) for shard in places])
        error = 4 * float(counts.std(ddof=1)) / wanted**0.5
        least = int((float(counts.mean()) - error) / split.grid.shard_rows * split.rows)
        if least > 0:
            return least
    kept = sum(_count(split, shard, without_tokens) for shard in range(split.shards))
    if kept == 0:
        raise StoreError(f"{split.where}: no row is left without the left-out tokens.")
    return kept


def _count(split: StoreSplit, shard: int, without_tokens: Collection[int]) -> int:
    kept = kept_rows(split, shard, (), without_tokens)
    return split.grid.shard_rows if kept is None else int(kept.sum())


def kept_moments(
    split: StoreSplit,
    name: str,
    without_tokens: Collection[int],
    shards: range | None = None,
) -> Moments:
    """Mean and variance per channel of the rows that are read.

    Args:
        split: the rows.
        name: activation array.
        without_tokens: token ids whose rows are left out.
        shards: that they are taken over, up to about a million rows; None: over all, by the sums
            of the store, where no tokens are left out, else over the first that are there.

    Raises:
        StoreError: no row is left.
    """
    if not without_tokens and shards is None:
        return split.moments(name)
    if shards is None:  # the first ones of a ring are gone
        shards = range(first_kept(split.folder, split.spec(name), split.shards), split.shards)
    rows = 0
    total = torch.zeros(int(split.spec(name).width or 0), dtype=torch.float64)
    squares = torch.zeros_like(total)
    for shard in shards:
        kept = kept_rows(split, shard, (name,), without_tokens)
        values = split.shard_rows(name, shard)
        for start in range(0, split.grid.shard_rows, _AT_ONCE):
            stop = min(start + _AT_ONCE, split.grid.shard_rows)
            part = values.part(start, stop).double()
            if kept is not None:
                part = part[torch.from_numpy(kept[start:stop])]
            total += part.sum(dim=0)
            squares += part.square().sum(dim=0)
            rows += len(part)
        if rows >= MOMENT_ROWS:
            break
    if rows == 0:
        raise StoreError(
            f"{split.where}: no row of {name} is left without the left-out tokens and those that "
            f"are not finite."
        )
    mean = total / rows
    return Moments(rows, mean, (squares / rows - mean.square()).clamp(min=0.0))

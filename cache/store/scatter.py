"""Which shards a writer owns, how they form windows, and to which of them a row goes.

Pure functions of numbers (docs/format.md, Order of rows).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["deal", "owned_shards", "window_sizes"]


def owned_shards(shards: int, rank: int, writers: int) -> range:
    """The shards of a split that one of several writers writes.

    >>> list(owned_shards(7, 1, 3))
    [1, 4]
    """
    return range(rank, shards, writers)


def window_sizes(shards: int, window: int) -> list[int]:
    """Numbers of shards of the windows: at most `window` each, as equal as they can be.

    >>> window_sizes(66, 64)
    [33, 33]
    """
    n = -(-shards // window)
    return [shards * (i + 1) // n - shards * i // n for i in range(n)]


def deal(
    rows: int, shards: int, first: int, *, seed: int, rank: int, window: int, block: int
) -> list[NDArray[np.int64]]:
    """Which rows of a block go to which open shard: a permutation, dealt in turn.

    Args:
        rows: rows in the block.
        shards: open shards.
        first: shard that gets the first permuted row.
        seed: of the store.
        rank: of the writer.
        window: number of the writer's window.
        block: number of the block within the window.

    Returns:
        For each open shard the indices of its rows, in the order in which they are appended.

    >>> dealt = deal(5, 2, 1, seed=0, rank=0, window=0, block=0)
    >>> [len(d) for d in dealt], sorted(int(i) for d in dealt for i in d)
    ([2, 3], [0, 1, 2, 3, 4])
    """
    philox = np.random.Philox(key=[seed, (rank << 32) + window], counter=[0, 0, 0, block])
    order = np.random.Generator(philox).permutation(rows)
    return [order[(s - first) % shards :: shards] for s in range(shards)]

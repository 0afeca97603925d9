"""Rows of a split in its order, both sides of a hookpoint at a time."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bsc.cache.store.kept import kept_rows
from bsc.cache.store.split import StoreSplit
from bsc.train.coders.coder import SparseCoder

__all__ = [
    "PIECE_ROWS",
    "RowBatch",
    "document_numbers",
    "piece_ranges",
    "row_batches",
    "rows_at_once",
    "rows_read",
    "text_starts",
]

PIECE_ROWS = 32_768
"""Rows of a piece at most, so that the codes of all coders of one piece fit the memory."""
_VALUES_AT_ONCE = 1 << 25
"""Pre-activations that are computed at a time."""


class RowBatch(NamedTuple):
    """Rows of both sides of a hookpoint, bfloat16."""

    x: Tensor
    """(n, d_in), the module's input."""
    y: Tensor
    """(n, d_out), its output."""
    number: Tensor
    """(n,) int64: number of each row in the split."""

    def side(self, coder: SparseCoder) -> Tensor:
        """The rows that a coder encodes."""
        return self.y if coder.config.side == "output" else self.x


def rows_at_once(n_latents: int) -> int:
    """Rows to encode at a time, so that the pre-activations of a wide coder fit the memory."""
    return max(1, min(8192, _VALUES_AT_ONCE // n_latents))


def row_batches(
    split: StoreSplit,
    hookpoint: str,
    n_latents: int,
    without_tokens: Collection[int] = (),
    *,
    first: int = 0,
    last: int | None = None,
) -> Iterator[RowBatch]:
    """Rows of a split that are read (store/kept.py), in its order.

    Args:
        split: of the store.
        hookpoint: module whose rows they are.
        n_latents: largest number of latents of a coder; wider coders get fewer rows at a time.
        without_tokens: token ids whose rows are left out.
        first: row to begin with.
        last: row to stop before; None: all.
    """
    names = (f"{hookpoint}/input", f"{hookpoint}/output")
    at_once = rows_at_once(n_latents)
    last, size = split.rows if last is None else min(last, split.rows), split.grid.shard_rows
    for shard in range(first // size, -(-last // size)):
        kept = kept_rows(split, shard, names, without_tokens)
        sides = [split.shard_rows(name, shard) for name in names]
        begin, end = max(first, shard * size), min(last, (shard + 1) * size)
        for start in range(begin, end, at_once):
            stop = min(start + at_once, end)
            here = slice(start - shard * size, stop - shard * size)
            x, y = (side.part(here.start, here.stop) for side in sides)
            number = torch.arange(start, stop)
            if kept is not None:
                chosen = torch.from_numpy(kept[here])
                x, y, number = x[chosen], y[chosen], number[chosen]
            if len(x):
                yield RowBatch(x, y, number)


def text_starts(doc_id: NDArray[Any], position: NDArray[np.int64]) -> NDArray[np.int64]:
    """First row of every text: it goes on while the document is the same and positions count up.

    Args:
        doc_id: (rows,) document of each row.
        position: (rows,) position in its text.
    """
    new = np.diff(position, prepend=-2) != 1
    new |= np.diff(doc_id.astype(np.int64), prepend=-1) != 0
    return np.flatnonzero(new)


def document_numbers(split: StoreSplit) -> NDArray[np.int64]:
    """Number of the document of each row, (rows,), from 0 in the order of their ids."""
    return np.unique(split.tokens("doc_id"), return_inverse=True)[1].astype(np.int64)


def piece_ranges(split: StoreSplit, max_rows: int | None = None) -> list[tuple[int, int]]:
    """Ranges of rows that are worked on and written together, within shards."""
    rows = split.rows if max_rows is None else min(split.rows, max_rows)
    size = split.grid.shard_rows
    ranges = []
    for shard in range(-(-rows // size)):
        end = min(rows, (shard + 1) * size)
        ranges += [
            (start, min(start + PIECE_ROWS, end)) for start in range(shard * size, end, PIECE_ROWS)
        ]
    return ranges


def rows_read(
    split: StoreSplit, hookpoint: str, max_rows: int | None, without_tokens: Collection[int] = ()
) -> NDArray[np.bool_]:
    """(rows of the split,) which of them are evaluated.

    Args:
        split: of the store.
        hookpoint: module whose rows they are.
        max_rows: rows at most; None: all.
        without_tokens: token ids whose rows are left out.
    """
    read = np.zeros(split.rows, bool)
    size = split.grid.shard_rows
    for shard in range(split.shards):
        names = (f"{hookpoint}/input", f"{hookpoint}/output")
        kept = kept_rows(split, shard, names, without_tokens)
        read[shard * size : (shard + 1) * size] = True if kept is None else kept
    read[piece_ranges(split, max_rows)[-1][1] :] = False
    return read

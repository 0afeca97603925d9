"""Held-out text to explain latents from, and text to test explanations on, which share nothing.

Documents are divided by a hash of the smallest n-gram that they hold (model/ngrams.py), so that two
documents that share much are on one side; then those rows to test on are left out that stand in an
n-gram of the other side all the same.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from bsc.cache.model.ngrams import NGRAM, Runs
from bsc.hashing import hash64

__all__ = ["EXPLAIN", "NEITHER", "PARTS", "TEST", "divide"]

PARTS = ("explain", "test")
EXPLAIN, TEST, NEITHER = range(3)
"""What a row is for; the first two are indices into `PARTS`."""


def divide(doc_id: NDArray[Any], ngrams: NDArray[np.uint64], seed: int = 0) -> NDArray[np.uint8]:
    """What each row of a split in order is for: `EXPLAIN`, `TEST` or `NEITHER`, (rows,).

    Args:
        doc_id: (rows,) document of each row.
        ngrams: (rows,) n-gram that ends with the row, or 0.
        seed: of the division.
    """
    documents, number = np.unique(doc_id, return_inverse=True)
    none = np.uint64(2**64 - 1)
    least = np.full(len(documents), none)
    np.minimum.at(least, number, np.where(ngrams > 0, ngrams, none))
    # A document too short for an n-gram goes by its number.
    least = np.where(least == none, documents.astype(np.uint64), least)
    explain = (hash64(least, seed) >> np.uint64(63) == 0)[number]
    known = np.unique(ngrams[explain & (ngrams > 0)])
    seen = np.isin(ngrams, known) & ~explain
    both = Runs(doc_id).covered(seen, NGRAM)
    part = np.where(explain, EXPLAIN, np.where(both, NEITHER, TEST))
    return part.astype(np.uint8)

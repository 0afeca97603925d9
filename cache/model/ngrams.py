"""The n-gram of every token: a hash of the 16 tokens of its document that end with it.

It is stored with each row (`tokens/ngram`), in the same shard, so whether a held-out text was
trained on can be seen in a store whatever the order of its rows and however many wrote it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from bsc.hashing import run_hashes

__all__ = ["NGRAM", "Runs", "token_ngrams"]

NGRAM = 16
"""Tokens of an n-gram."""


def token_ngrams(ids: NDArray[np.int64]) -> NDArray[np.uint64]:
    """N-gram of each token of a document, (n,), 63 bits; 0 for the first 15, which have none.

    >>> one = token_ngrams(np.arange(20))
    >>> [int(n > 0) for n in one[13:17]], len(one)
    ([0, 0, 1, 1], 20)
    """
    found = np.zeros(len(ids), np.uint64)
    found[NGRAM - 1 :] = np.maximum(run_hashes(ids, NGRAM) >> np.uint64(1), np.uint64(1))
    return found


class Runs:
    """The rows of a split, document by document in the order of their tokens.

    Of several writers the shards of a document may lie apart; they are in order all the same.
    """

    def __init__(self, documents: NDArray[Any]) -> None:
        """Take the document of every row of a split that is in the order of the text, (rows,)."""
        self.order: NDArray[np.int64] = np.argsort(documents, kind="stable")
        """Rows of the split, those of a document together."""
        ordered = documents[self.order]
        first = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))
        sizes = np.diff(np.append(first, len(ordered)))
        self.starts: NDArray[np.int64] = np.repeat(first, sizes)[: len(ordered)]
        """For each place of `order` that of the first row of its document."""

    def covered(self, marked: NDArray[np.bool_], length: int) -> NDArray[np.bool_]:
        """Rows of the split that belong to a marked run.

        Args:
            marked: (rows,) whether the run of a document that ends with a row is marked.
            length: rows of a run.

        >>> runs = Runs(np.array([4, 4, 7, 4]))
        >>> runs.covered(np.array([False, False, True, True]), 2).tolist()
        [False, True, True, True]
        """
        last = np.flatnonzero(marked[self.order])
        change = np.zeros(len(marked) + 1, np.int64)
        np.add.at(change, np.maximum(last - length + 1, self.starts[last]), 1)
        np.add.at(change, last + 1, -1)
        found = np.empty(len(marked), bool)
        found[self.order] = np.cumsum(change)[:-1] > 0
        return found

    def whole(self, marked: NDArray[np.bool_], runs: int, length: int) -> tuple[int, int]:
        """How many runs of `length` rows there are, and how many end with `runs` marked rows."""
        place = np.arange(len(marked))
        is_run = place - self.starts >= length - 1
        last_other = np.maximum.accumulate(np.where(marked[self.order], -1, place))
        return int(is_run.sum()), int((is_run & (place - last_other >= runs)).sum())

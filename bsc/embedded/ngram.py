"""Interpolated Kneser-Ney n-gram model: the yardstick that the embedded model has to beat.

    P_n(w | h) = max(c(h w) - D, 0) / c(h) + D * u(h) / c(h) * P_{n-1}(w | h')

where h is the n - 1 tokens before w and h' is h without its first token. At the highest order c
counts occurrences; below it, c(h w) counts the distinct tokens seen before h w (continuation
counts). u(h) is the number of distinct tokens seen after h, and the discount
D = n_1 / (n_1 + 2 n_2) with n_i the number of n-grams counted i times. P_0 is uniform.

Source: Kneser and Ney 1995; Chen and Goodman 1998, section 2.7 (interpolated form).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["InterpolatedNgram"]

Keys = NDArray[np.uint64]


def _keys(tokens: NDArray[np.integer], order: int, bits: int) -> Keys:
    """Every run of `order` tokens as one integer, the oldest token in the highest bits."""
    windows = len(tokens) - order + 1
    keys = np.zeros(max(windows, 0), dtype=np.uint64)
    for i in range(order):
        keys = (keys << np.uint64(bits)) | tokens[i : i + windows].astype(np.uint64)
    return keys


class InterpolatedNgram:
    """Counts of a token sequence, kept as sorted keys: 16 bytes per distinct n-gram and order."""

    def __init__(self, tokens: NDArray[np.integer], *, order: int, vocab: int) -> None:
        """Count `tokens`, a 1-d array of ids below `vocab`.

        Raises:
            ValueError: `order` tokens of `vocab` do not fit in 64 bits, or no n-gram fits.
        """
        self.order, self.vocab, self.bits = order, vocab, int(vocab - 1).bit_length()
        if self.bits * order > 64:
            raise ValueError(f"{order} tokens of {self.bits} bits do not fit in 64 bits")
        if len(tokens) < order:
            raise ValueError(f"{len(tokens)} tokens hold no {order}-gram")
        self.grams: list[tuple[Keys, NDArray[np.int64]]] = []
        self.histories: list[tuple[Keys, NDArray[np.int64], NDArray[np.int64]]] = []
        keys, counts = np.unique(_keys(tokens, order, self.bits), return_counts=True)
        for n in range(order, 0, -1):
            self.grams.insert(0, (keys, counts))
            histories, first = np.unique(keys >> np.uint64(self.bits), return_index=True)
            distinct = np.diff(np.append(first, len(keys)))
            self.histories.insert(0, (histories, np.add.reduceat(counts, first), distinct))
            if n > 1:
                # Continuation counts: each distinct n-gram is one left extension of its suffix.
                suffix = np.uint64((1 << (self.bits * (n - 1))) - 1)
                keys, counts = np.unique(keys & suffix, return_counts=True)

    @staticmethod
    def _lookup(keys: Keys, values: NDArray[np.int64], wanted: Keys) -> NDArray[np.int64]:
        at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
        return np.where(keys[at] == wanted, values[at], 0)

    def probabilities(self, tokens: NDArray[np.integer]) -> NDArray[np.float64]:
        """P(token | the order - 1 tokens before it) for every token but the first.

        The first tokens of the sequence use the orders that their shorter history allows.
        """
        p = np.full(len(tokens) - 1, 1 / self.vocab)
        for n in range(1, self.order + 1):
            keys, counts = self.grams[n - 1]
            histories, totals, distinct = self.histories[n - 1]
            once, twice = int((counts == 1).sum()), int((counts == 2).sum())
            discount = once / (once + 2 * twice) if once else 0.5
            wanted = _keys(tokens, n, self.bits)[1 if n == 1 else 0 :]
            history = wanted >> np.uint64(self.bits)
            c = self._lookup(keys, counts, wanted).astype(np.float64)
            total = self._lookup(histories, totals, history).astype(np.float64)
            seen = total > 0
            total[~seen] = 1
            u = self._lookup(histories, distinct, history)
            tail = p[len(p) - len(wanted) :]  # the positions that have n - 1 tokens before them
            mixed = np.maximum(c - discount, 0) / total + discount * u / total * tail
            tail[seen] = mixed[seen]
        return p

    def nats(self, tokens: NDArray[np.integer]) -> float:
        """Summed negative log likelihood of every token but the first."""
        return float(-np.log(self.probabilities(tokens)).sum())

"""What the firings of each latent of a coder are like: strength, tokens, positions."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from bsc.eval.figures.examples import STRATA, ordered_bits
from bsc.eval.passes.codes import LatentCode

__all__ = ["BINS", "NO_TOKEN", "FiringFacts", "firing_facts", "position_edges"]

BINS = 32
"""Bins of equal width from the smallest to the largest margin of a latent."""
TOKENS = 10
"""Tokens that a latent fires on most often, of each latent."""
NO_TOKEN = -1


class FiringFacts(NamedTuple):
    """One row for each latent; zeros where it never fired."""

    mean_margin: NDArray[np.float64]
    """(F,)."""
    borders: NDArray[np.float32]
    """(F, STRATA + 1): the smallest margin of each stratum, and the largest of all."""
    histogram: NDArray[np.int64]
    """(F, BINS) firings by margin."""
    token: NDArray[np.int64]
    """(F, TOKENS) tokens that it fires on most often, `NO_TOKEN` where there are fewer."""
    token_firings: NDArray[np.int64]
    """(F, TOKENS) its firings on them."""
    positions: NDArray[np.int64]
    """(F, P) firings by position in the context."""


def position_edges(longest: int) -> NDArray[np.int64]:
    """Borders of bins of positions: 0, 1, 2 and 3, 4 to 7, and so on, up to `longest`.

    >>> position_edges(20).tolist()
    [0, 1, 2, 4, 8, 16, 20]
    """
    edges = [0, *(1 << i for i in range(64) if 1 << i < longest), longest]
    return np.array(edges, np.int64)


def firing_facts(
    code: LatentCode,
    token: NDArray[np.uint32],
    position_bin: NDArray[np.int64],
    n_positions: int,
) -> FiringFacts:
    """Facts of every latent, in one pass over the code.

    Args:
        code: sorted by latent.
        token: (rows,) token of each row.
        position_bin: (rows,) in which bin of positions each row is.
        n_positions: number of those bins, P.
    """
    f = code.n_latents
    facts = FiringFacts(
        np.zeros(f),
        np.zeros((f, STRATA + 1), np.float32),
        np.zeros((f, BINS), np.int64),
        np.full((f, TOKENS), NO_TOKEN, np.int64),
        np.zeros((f, TOKENS), np.int64),
        np.zeros((f, n_positions), np.int64),
    )
    for first, last in code.ranges():
        here = slice(int(code.offsets[first]), int(code.offsets[last]))
        n = np.diff(code.offsets[first : last + 1])
        if here.stop == here.start:
            continue
        own = np.repeat(np.arange(last - first), n)
        row, margin = code.row[here], code.margin[here]
        _margins(facts, first, n, own, margin)
        _tokens(facts, first, own, token[row])
        bins = own * n_positions + position_bin[row]
        counts = np.bincount(bins, minlength=(last - first) * n_positions)
        facts.positions[first:last] = counts.reshape(-1, n_positions)
    return facts


def _margins(
    facts: FiringFacts,
    first: int,
    n: NDArray[np.int64],
    own: NDArray[np.int64],
    margin: NDArray[np.float32],
) -> None:
    alive, last = np.flatnonzero(n), first + len(n)
    begins = np.cumsum(n) - n
    key = own.astype(np.uint64) << np.uint64(32) | ordered_bits(margin)
    ordered = margin[np.argsort(key)]
    ranks = -(-np.arange(STRATA) * n[alive, None] // STRATA)  # where a stratum begins
    ranks = np.minimum(ranks, n[alive, None] - 1)  # of fewer firings than strata
    facts.borders[first + alive, :STRATA] = ordered[begins[alive, None] + ranks]
    facts.borders[first + alive, STRATA] = ordered[begins[alive] + n[alive] - 1]
    sums = np.bincount(own, margin.astype(np.float64), minlength=len(n))
    facts.mean_margin[first + alive] = sums[alive] / n[alive]
    low, high = facts.borders[first:last, 0], facts.borders[first:last, STRATA]
    width = np.where(high > low, high - low, 1)
    place = ((margin - low[own]) / width[own] * BINS).astype(np.int64).clip(0, BINS - 1)
    counts = np.bincount(own * BINS + place, minlength=len(n) * BINS)
    facts.histogram[first:last] = counts.reshape(-1, BINS)


def _tokens(
    facts: FiringFacts, first: int, own: NDArray[np.int64], token: NDArray[np.uint32]
) -> None:
    key = np.sort(own.astype(np.uint64) << np.uint64(32) | token.astype(np.uint64))
    begins = np.flatnonzero(np.append(True, key[1:] != key[:-1]))
    pair, count = key[begins], np.diff(begins, append=len(key))
    latent = (pair >> np.uint64(32)).astype(np.int64)
    token_of = (pair & np.uint64(0xFFFFFFFF)).astype(np.int64)
    order = np.lexsort((token_of, -count, latent))
    place = np.arange(len(latent)) - np.searchsorted(latent, latent)
    kept = order[place < TOKENS]
    at = (first + latent[kept], place[place < TOKENS])
    facts.token[at] = token_of[kept]
    facts.token_firings[at] = count[kept]

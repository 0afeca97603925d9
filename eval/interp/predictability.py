"""Predictability: how well a small fixed classifier tells from the tokens where a latent fires.

A score that needs no language model, and is none of an explanation: it says how far a latent's
firing follows from the last few tokens and the position. For each latent, log likelihood ratios of
what the local context is (hashed n-grams of the last four tokens, the position), counted on one
half of the documents to explain from and weighed by a logistic regression on the other half, are
tested on the documents to test on: AUC and balanced accuracy. Formulas: docs/interp.md.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from bsc.eval.figures.division import EXPLAIN, NEITHER
from bsc.eval.passes.batches import text_starts
from bsc.eval.passes.codes import LatentCode
from bsc.hashing import hash64

__all__ = ["CONTEXTS", "Contexts", "Predictability", "contexts_of_tokens", "predictability"]

BUCKETS = 1 << 16
"""Hash buckets of each kind of context."""
CONTEXTS = (
    ("token", (0,)),
    ("token before", (1,)),
    ("second token before", (2,)),
    ("third token before", (3,)),
    ("two tokens", (0, 1)),
    ("two tokens before", (1, 2)),
    ("token and the second before", (0, 2)),
    ("three tokens", (0, 1, 2)),
)
"""Kinds of context, as distances of their tokens; the position is one more."""
PRIOR = 4.0
"""Firings that the rates of all tokens count for in a latent's own counts."""
RIDGE = 1.0
ROUNDS = 8
"""Newton steps of the logistic regression at most."""
_SMALL_STEP = 1e-3
POSITIVES, NEGATIVES = 500, 1_000
"""Rows with and without a firing at most that a latent is weighed on, and tested on."""
MIN_ROWS = 10
"""Fewer rows with a firing, to weigh by or to test on, give no score."""


class Contexts(NamedTuple):
    """What is before each row, as bucket numbers."""

    bucket: NDArray[np.int32]
    """(kinds, rows)."""
    part: NDArray[np.int8]
    """(rows,) 0: counted, 1: weighed, 2: tested on, 3: not read."""


class Predictability(NamedTuple):
    """Scores of all latents of a coder; NaN where there are too few firings."""

    auc: NDArray[np.float64]
    balanced_accuracy: NDArray[np.float64]


def contexts_of_tokens(
    ids: NDArray[Any],
    doc_id: NDArray[Any],
    position: NDArray[np.int64],
    read: NDArray[np.bool_],
    division: NDArray[np.uint8],
    *,
    seed: int = 0,
) -> Contexts:
    """Hash the local context of every row.

    Args:
        ids: (rows,) token ids.
        doc_id: (rows,) document of each.
        position: (rows,) position in the text; where it does not count up, another text begins.
        read: (rows,) whether the row was evaluated.
        division: (rows,) what the row is for (figures/division.py).
        seed: of the hashes and of the halves.
    """
    n = len(ids)
    starts = text_starts(doc_id, position)
    since = np.arange(n) - np.repeat(starts, np.diff([*starts, n]))
    before = []
    for distance in range(4):
        shifted = np.zeros(n, np.uint64)
        shifted[distance:] = ids[: n - distance].astype(np.uint64) + np.uint64(1)
        before.append(np.where(since >= distance, shifted, np.uint64(0)))
    bucket = np.empty((len(CONTEXTS) + 1, n), np.int32)
    for kind, (_, distances) in enumerate(CONTEXTS):
        key = np.zeros(n, np.uint64)
        for distance in distances:
            key = hash64(key ^ before[distance], seed + distance + 1)
        bucket[kind] = (key & np.uint64(BUCKETS - 1)).astype(np.int32)
    # Single positions at the beginning of a text, then ever wider ranges.
    fine = np.minimum(position, 31)
    wide = 32 + 4 * np.log2(np.maximum(position, 32) / 32)
    bucket[-1] = np.where(position < 32, fine, wide.astype(np.int64)).astype(np.int32)
    weighed = hash64(doc_id, seed + 7) >> np.uint64(63) == 0
    part = np.where(division == EXPLAIN, np.where(weighed, 1, 0), 2)
    return Contexts(bucket, np.where(read & (division != NEITHER), part, 3).astype(np.int8))


def _sample(rows: NDArray[np.int64], n: int, seed: int) -> NDArray[np.int64]:
    """Some of the rows, by hash."""
    if len(rows) <= n:
        return rows
    return rows[np.argpartition(hash64(rows, seed), n)[:n]]


def _among(values: NDArray[np.int64], rows: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which values are among ascending rows."""
    place = np.minimum(np.searchsorted(rows, values), len(rows) - 1)
    return np.asarray(rows[place] == values)


class _Counted(NamedTuple):
    """What is the same for all latents."""

    rows: int
    """Rows that are counted on."""
    counts: NDArray[np.int64]
    """(kinds, buckets) of them in each bucket."""
    quiet: list[NDArray[np.int64]]
    """Rows of part 1 and of part 2 to look for ones without a firing in."""


def predictability(code: LatentCode, contexts: Contexts, *, seed: int = 0) -> Predictability:
    """Score every latent.

    Args:
        code: sorted by latent.
        contexts: of the rows that the code is of.
        seed: of the rows that are drawn.
    """
    counted = contexts.part == 0
    n = int(counted.sum())
    counts = np.stack([np.bincount(b[counted], minlength=BUCKETS) for b in contexts.bucket])
    quiet = [_sample(np.flatnonzero(contexts.part == p), 2 * NEGATIVES, seed + p) for p in (1, 2)]
    common = _Counted(n, counts, quiet)
    auc = np.full(code.n_latents, np.nan)
    accuracy = np.full(code.n_latents, np.nan)
    for latent in np.flatnonzero(np.diff(code.offsets) >= 3 * MIN_ROWS):
        rows = code.of(int(latent))[0].astype(np.int64)
        if found := _one(rows, contexts, common, seed):
            auc[latent], accuracy[latent] = found
    return Predictability(auc, accuracy)


def _one(
    rows: NDArray[np.int64], contexts: Contexts, common: _Counted, seed: int
) -> tuple[float, float] | None:
    """AUC and balanced accuracy of one latent."""
    part = contexts.part[rows]
    firing = [_sample(rows[part == p], POSITIVES, seed + 2 + p) for p in (1, 2)]
    silent = [q[~_among(q, rows)][:NEGATIVES] for q in common.quiet]
    own = rows[part == 0]
    if min(len(own), *map(len, firing), *map(len, silent)) < MIN_ROWS:
        return None
    others = common.rows - len(own)
    at = np.concatenate([firing[0], silent[0], firing[1], silent[1]])
    bucket = contexts.bucket[:, at]
    here = np.empty(bucket.shape)
    for kind, row in enumerate(bucket):
        here[kind] = np.bincount(contexts.bucket[kind, own], minlength=BUCKETS)[row]
    all_rows = np.take_along_axis(common.counts, bucket, axis=1)
    # A context that was never counted says nothing.
    prior = PRIOR * np.maximum(all_rows, 0.5) / common.rows
    with_it = (here + prior) / (len(own) + PRIOR)
    without = (all_rows - here + prior) / (others + PRIOR)
    ratios = np.where(all_rows > 0, np.log(with_it / without), 0.0)
    features = np.split(ratios, [len(firing[0]) + len(silent[0])], axis=1)
    sizes = [(len(f), len(s)) for f, s in zip(firing, silent, strict=True)]
    weights = _regression(features[0], *sizes[0])
    predicted = weights[:-1] @ features[1] + weights[-1]
    positive, negative = predicted[: sizes[1][0]], predicted[sizes[1][0] :]
    ranks = rankdata(predicted)
    a, b = sizes[1]
    auc = (ranks[:a].sum() - a * (a + 1) / 2) / (a * b)
    # Halves of a tie, as the AUC counts them.
    tpr = (positive > 0).mean() + (positive == 0).mean() / 2
    tnr = (negative < 0).mean() + (negative == 0).mean() / 2
    return float(auc), float((tpr + tnr) / 2)


def _regression(features: NDArray[np.float64], firing: int, silent: int) -> NDArray[np.float64]:
    """Ridge logistic regression, both classes of equal weight; the last weight is the constant.

    Args:
        features: (kinds, rows), firing rows first.
        firing: number of rows with a firing.
        silent: number of rows without.
    """
    x = np.vstack([features, np.ones(features.shape[1])])
    y = np.concatenate([np.ones(firing), np.zeros(silent)])
    # Each class counts as many rows as there are of the smaller one.
    least = min(firing, silent)
    weight = np.concatenate([np.full(firing, least / firing), np.full(silent, least / silent)])
    penalty = np.full(len(x), RIDGE)
    penalty[-1] = 1e-3
    w = np.zeros(len(x))
    for _ in range(ROUNDS):
        p = 1 / (1 + np.exp(-np.clip(w @ x, -30, 30)))
        gradient = x @ (weight * (p - y)) + penalty * w
        curvature = weight * p * (1 - p)
        step = np.linalg.solve((x * curvature) @ x.T + np.diag(penalty), gradient)
        largest = float(np.abs(step).max())
        w -= step * min(1.0, 5.0 / max(1e-12, largest))
        if largest < _SMALL_STEP:
            break
    return w

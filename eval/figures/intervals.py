"""Confidence intervals over documents.

Tokens of one document depend on each other, so documents are the sample, and sums are kept by
document. A figure is a ratio of sums, r = sum_i a_i / sum_i b_i. Its standard error s is the
jackknife's: what leaving out one document after the other changes. The interval is r - t s to
r + t s, or, for figures that cannot be negative, r exp(-t s') to r exp(t s') with s' that of log r;
t is the 97.5 % quantile of Student's distribution.

Its degrees of freedom are those of an estimate of variance to which document i contributes in
proportion to b_i^2 (Satterthwaite 1946; for clusters Bell and McCaffrey 2002):

    d = (sum_i b_i^2)^2 / sum_i b_i^4 - 1

which is n - 1 for documents of one size, and much less where a few hold most of the text or of the
variance: then little is known, and the interval says so. docs/evaluation.md has the coverage that
was measured on real documents, of this and of other methods.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from bsc.eval.evaluation import Interval

__all__ = [
    "LEVEL",
    "MIN_SAMPLE",
    "degrees_of_freedom",
    "ratio_intervals",
    "value_interval",
]

LEVEL = 0.95
MIN_SAMPLE = 8
"""Below this many documents, seeds or classes no interval is given: none is invented."""


def degrees_of_freedom(weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """Degrees of freedom of the standard error of a mean; at least 1.

    Args:
        weights: (documents,), or (documents, columns).

    >>> degrees_of_freedom(np.ones(10)).item(), degrees_of_freedom(np.array([8, 1, 1, 1])).item()
    (9.0, 1.0)
    """
    squares = np.square(weights, dtype=np.float64)
    return np.asarray(np.maximum(squares.sum(axis=0) ** 2 / np.square(squares).sum(axis=0) - 1, 1))


def ratio_intervals(
    numerators: NDArray[np.float64], denominators: NDArray[np.float64], *, positive: bool = False
) -> list[Interval]:
    """95 % intervals of sum(numerator) / sum(denominator), one for each column.

    Args:
        numerators: (documents, columns).
        denominators: (documents,) or (documents, columns), such as predicted tokens; not negative.
            Documents with nothing in any of them are none.
        positive: whether the figures are of a kind that cannot be negative, such as FVU and KL, so
            that intervals of their logarithms are taken.

    Returns:
        One interval for each column; None with fewer than 8 documents, or where leaving out one
        leaves nothing to divide by.
    """
    denominators = np.broadcast_to(
        denominators[:, None] if denominators.ndim == 1 else denominators, numerators.shape
    )
    used = (denominators != 0).any(axis=1)
    numerators, denominators = numerators[used], denominators[used]
    n, columns = numerators.shape
    if n < MIN_SAMPLE:
        return [None] * columns
    a, b = numerators.sum(axis=0), denominators.sum(axis=0)
    by_logarithm = positive & (a > numerators.max(axis=0))  # else the logarithm may be of 0
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio, without = a / b, (a - numerators) / (b - denominators)
        t = stats.t.ppf((1 + LEVEL) / 2, degrees_of_freedom(denominators))
        reach = t * _standard_error(without)
        factor = np.exp(t * _standard_error(np.log(without)))
        low = np.where(by_logarithm, ratio / factor, ratio - reach)
        high = np.where(by_logarithm, ratio * factor, ratio + reach)
    return [
        [float(x), float(y)] if np.isfinite([x, y]).all() else None
        for x, y in zip(low, high, strict=True)
    ]


def _standard_error(without: NDArray[np.float64]) -> NDArray[np.float64]:
    """The jackknife's, from what a figure is without each document, (documents, columns)."""
    n = len(without)
    squares = np.square(without - without.mean(axis=0)).sum(axis=0)
    return np.asarray(np.sqrt((n - 1) / n * squares))


def value_interval(values: NDArray[np.float64]) -> Interval:
    """95 % interval of the mean of independent values, such as one per class."""
    column = np.asarray(values, np.float64)[:, None]
    return ratio_intervals(column, np.ones(len(column)))[0]

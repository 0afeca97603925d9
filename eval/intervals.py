"""Confidence intervals by resampling documents.

Tokens of one document depend on each other, so whole documents are drawn, and sums are kept by
document. With few of them the percentile interval of a bootstrap is too short; its quantiles are
moved outwards by the ratio of Student's t to the normal distribution (Hesterberg 2015, "What
teachers should know about the bootstrap", section 5.3, the expanded percentile interval).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import stats

__all__ = [
    "LEVEL",
    "MIN_BLOCKS",
    "RESAMPLES",
    "Interval",
    "ratio_intervals",
    "value_interval",
    "widened_quantiles",
]

LEVEL = 0.95
MIN_BLOCKS = 8
"""Below this many documents, seeds or classes no interval is given: none is invented."""
RESAMPLES = 2_000
_AT_ONCE = 1 << 22

Interval = list[float] | None
"""[low, high], or None where the sample is too small for one."""


def widened_quantiles(n: int) -> tuple[float, float]:
    """Quantiles of the resampled values of n blocks between which the interval lies.

    >>> [round(q, 4) for n in (10, 10**6) for q in widened_quantiles(n)]
    [0.0086, 0.9914, 0.025, 0.975]
    """
    t = stats.t.ppf((1 - LEVEL) / 2, n - 1) * np.sqrt(n / (n - 1))
    low = float(stats.norm.cdf(t))
    return low, 1 - low


def ratio_intervals(
    numerators: NDArray[np.float64],
    denominators: NDArray[np.float64],
    *,
    seed: int = 0,
) -> list[Interval]:
    """95 % intervals of sum(numerator) / sum(denominator), one for each column.

    All columns see the same resamples, so differences of columns may be given as a column.

    Args:
        numerators: (documents, columns).
        denominators: (documents,) or (documents, columns), such as predicted tokens.
        seed: of the resampling.

    Returns:
        One interval for each column.
    """
    if denominators.ndim == 1:
        denominators = denominators[:, None]
    n, columns = numerators.shape
    if n < MIN_BLOCKS:
        return [None] * columns
    rng = np.random.Generator(np.random.Philox(key=seed))
    at_once = max(1, _AT_ONCE // n)
    resampled = []
    for start in range(0, RESAMPLES, at_once):
        size = min(at_once, RESAMPLES - start)
        # How often each context was drawn: the sums of all columns are then one product.
        times = rng.multinomial(n, np.full(n, 1 / n), size=size).astype(np.float64)
        with np.errstate(invalid="ignore", divide="ignore"):
            resampled.append((times @ numerators) / (times @ denominators))
    low, high = np.nanquantile(np.concatenate(resampled), widened_quantiles(n), axis=0)
    return [[float(a), float(b)] if np.isfinite([a, b]).all() else None
            for a, b in zip(low, high, strict=True)]  # fmt: skip


def value_interval(values: NDArray[np.float64], *, seed: int = 0) -> Interval:
    """95 % interval of the mean of independent values, such as one per class."""
    column = np.asarray(values, np.float64)[:, None]
    return ratio_intervals(column, np.ones(len(column)), seed=seed)[0]

"""Estimates over seeds and documents, and the verdict that an estimate gives.

The sample of a study is twice clustered: coders of several seeds were measured on the same
documents (or classes). With d_s the figure of seed s over all documents and d = mean_s d_s,

    Var(d) = V_documents + V_seeds
    V_documents  the jackknife's: what leaving out one document after the other changes in d
    V_seeds      sum_s (d_s - d)^2 / (S (S - 1))

What differs by seed and document alone is counted in both, so the sum is rather too large than too
small (Cameron, Gelbach and Miller 2011 take it off; it can then be negative). The interval is
Student's, with Satterthwaite's degrees of freedom

    (V_documents + V_seeds)^2 / (V_documents^2 / f_documents + V_seeds^2 / (S - 1))

where f_documents is that of bsc/eval/figures/intervals.py. A ratio is taken as the difference of
logarithms. docs/study.md has how often the verdicts are right on simulated studies.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import stats
from scipy.optimize import brentq

from bsc.eval.figures.intervals import LEVEL, MIN_SAMPLE, degrees_of_freedom
from bsc.study.config import Bound

__all__ = ["Estimate", "Sums", "Verdict", "decide", "estimate", "resolution"]

Verdict = Literal["holds", "does not hold", "not decided"]
_SAME = 1e-9
"""Differences of so small a share of the figures are rounding."""
_LARGEST = 700.0
"""Logarithm of what a float can still hold."""
POWER = 0.8
"""Share of studies that decide an effect of the size that `resolution` gives."""


class Sums(NamedTuple):
    """A figure of one coder, as a ratio of sums over documents, or classes, or one unit."""

    numerators: NDArray[np.float64]
    """(units,)"""
    weights: NDArray[np.float64]
    """(units,)"""
    units: str = ""
    """What tells these documents or classes from others; sums of the same ones are paired."""

    @property
    def value(self) -> float:
        """The figure."""
        return float(self.numerators.sum() / self.weights.sum())

    def padded(self, units: int) -> Sums:
        """With further units that weigh nothing."""
        more = (0, units - len(self.weights))
        return Sums(np.pad(self.numerators, more), np.pad(self.weights, more), self.units)


_Rows = Sequence[Sequence[Sums]]


class Estimate(NamedTuple):
    """A mean over seeds of a figure, a difference or the logarithm of a ratio."""

    mean: float
    """Of the logarithms, where it is a ratio."""
    error: float
    """Standard error; NaN where none is known."""
    freedom: float
    """Degrees of freedom of the error."""
    ratio: bool
    seeds: int
    units: int
    error_seeds: float
    """Part of the error that comes of the seeds; 0 with one seed."""
    error_units: float
    """Part of the error that comes of the documents or classes; 0 where there is one unit."""

    @property
    def value(self) -> float:
        """The figure as people read it."""
        return _factor(self.mean) if self.ratio else self.mean

    def interval(self, level: float = LEVEL) -> list[float] | None:
        """Student's interval; None where no error is known."""
        if not math.isfinite(self.error):
            return None
        reach = float(stats.t.ppf((1 + level) / 2, self.freedom)) * self.error
        ends = [self.mean - reach, self.mean + reach]
        return [_factor(end) for end in ends] if self.ratio else ends


def _factor(logarithm: float) -> float:
    """What a logarithm stands for, where little is known rather too near to 1 than infinite."""
    return math.exp(max(-_LARGEST, min(_LARGEST, logarithm)))


def estimate(first: _Rows, against: _Rows | None = None, *, ratio: bool = False) -> Estimate:
    """Mean over seeds, and over pairs of a seed, of a figure or of its difference from another.

    Args:
        first: by seed, then by pair; every seed has the same pairs, of the same documents.
        against: the same; None: the figure itself. Of other documents than `first`, such as those
            of another store, the variances of both sides are added.
        ratio: whether the ratio is meant.

    >>> one = [[Sums(np.array([1.0]), np.ones(1))], [Sums(np.array([3.0]), np.ones(1))]]
    >>> found = estimate(one)
    >>> found.mean, round(found.error, 6), found.freedom
    (2.0, 1.0, 1.0)
    """
    paired = against is None or first[0][0].units == against[0][0].units
    rows = [first] if against is None else [first, against]
    rows = _lined_up(*rows) if paired else [_lined_up(side)[0] for side in rows]
    sides = [_side(side, ratio) for side in rows]
    with np.errstate(invalid="ignore"):  # infinite less infinite, of the logarithms of 0
        whole = sides[0].whole if against is None else sides[0].whole - sides[1].whole
        if against is not None and paired:
            sides = [sides[0]._replace(without=sides[0].without - sides[1].without)]
    by_seed = whole.mean(axis=1)
    seeds = len(by_seed)
    of_seeds = float(by_seed.var(ddof=1) / seeds) if seeds > 1 else 0.0
    parts = [_jackknife(side) for side in sides]
    units = min(side.without.shape[-1] for side in sides)
    of_units = sum(part.variance for part in parts)
    total = of_seeds + of_units
    scale = float(np.abs(sides[0].whole).max())
    square = sum(part.variance**2 / part.freedom for part in parts)
    square += of_seeds**2 / (seeds - 1) if seeds > 1 else 0.0
    known = (seeds > 1 or units > 1) and all(part.known for part in parts)
    return Estimate(
        mean=float(by_seed.mean()),
        # Seeds that all give the same number, as counts may, say nothing of how they differ.
        error=math.sqrt(total) if known and total > (_SAME * scale) ** 2 else math.nan,
        freedom=total**2 / square if square > 0 else 1.0,
        ratio=ratio,
        seeds=seeds,
        units=units,
        error_seeds=math.sqrt(of_seeds),
        error_units=math.sqrt(of_units),
    )


def _lined_up(*sides: _Rows) -> list[_Rows]:
    """The sums over the same units: those that some lack weigh nothing there, and those that weigh
    nothing in any are none."""
    units = max(len(s.weights) for side in sides for row in side for s in row)
    long = [[[s.padded(units) for s in row] for row in side] for side in sides]
    used = np.any([s.weights != 0 for side in long for row in side for s in row], axis=0)
    return [[[Sums(s.numerators[used], s.weights[used], s.units) for s in row] for row in side]
            for side in long]  # fmt: skip


class _Side(NamedTuple):
    """Figures of one side."""

    whole: NDArray[np.float64]
    """(seeds, pairs)"""
    without: NDArray[np.float64]
    """(seeds, pairs, units): the same without each unit."""
    weights: NDArray[np.float64]
    """(units,): mean weights."""


def _side(rows: _Rows, ratio: bool) -> _Side:
    numerators = np.array([[s.numerators for s in row] for row in rows], np.float64)
    weights = np.array([[s.weights for s in row] for row in rows], np.float64)
    a, b = numerators.sum(axis=-1), weights.sum(axis=-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        whole = a / b
        without = (a[..., None] - numerators) / (b[..., None] - weights)
        if ratio:
            whole, without = np.log(whole), np.log(without)
    if without.shape[-1] == 1:
        without = whole[..., None]
    return _Side(whole, without, weights.mean(axis=(0, 1)))


class _Part(NamedTuple):
    """What the units of a side contribute to the variance."""

    variance: float
    freedom: float
    known: bool
    """Whether there are enough of them, or one, which contributes nothing."""


def _jackknife(side: _Side) -> _Part:
    units = side.without.shape[-1]
    if units < MIN_SAMPLE:
        return _Part(0.0, 1.0, units == 1)
    left_out = side.without.mean(axis=(0, 1))
    if not np.isfinite(left_out).all():  # one unit holds all that there is to divide
        return _Part(0.0, 1.0, False)
    variance = float((units - 1) / units * np.square(left_out - left_out.mean()).sum())
    return _Part(variance, float(degrees_of_freedom(side.weights)), True)


def resolution(found: Estimate) -> float | None:
    """How far from its bound an effect has to be to be decided in four studies of five; of a ratio
    as a factor. None where no error is known."""
    if not math.isfinite(found.error):
        return None
    reach = _noncentrality(found.freedom) * found.error
    return _factor(reach) if found.ratio else reach


@cache
def _noncentrality(freedom: float) -> float:
    """Effect in standard errors with which Student's t is beyond its quantile in POWER of studies,
    by the noncentral distribution: the error is itself an estimate, and a poor one of few seeds."""
    beyond = stats.t.ppf((1 + LEVEL) / 2, freedom)
    return float(brentq(lambda e: stats.nct.sf(beyond, freedom, e) - POWER, 0.0, 20 * beyond))


def decide(
    estimates: Sequence[Estimate | None], bounds: Sequence[Bound], *, some: bool = False
) -> Verdict:
    """The verdict of a claim on one or several estimates.

    A claim on all of them holds if each one's 95 % interval lies where it is claimed to be, and
    does not hold if the interval of any of m of them at level 1 - 0.05 / m lies elsewhere. For a
    claim on some of them it is the other way round. So a claim that is true is found not to hold in
    2.5 % of studies at most, and one that is false to hold in 2.5 % (for all: Berger 1982; for
    some: Bonferroni).

    Args:
        estimates: at least one; None: of it nothing is known, so it lies nowhere.
        bounds: of each.
        some: whether one estimate is enough.
    """
    strict = 1 - (1 - LEVEL) / len(estimates)
    pairs = list(zip(estimates, bounds, strict=True))
    holding = [_lies(e, b, strict if some else LEVEL) is True for e, b in pairs]
    failing = [_lies(e, b, LEVEL if some else strict) is False for e, b in pairs]
    if any(holding) if some else all(holding):
        return "holds"
    return "does not hold" if (all(failing) if some else any(failing)) else "not decided"


def _lies(found: Estimate | None, bound: Bound, level: float) -> bool | None:
    """Whether an interval lies where it is claimed to be; None: in part, or not known. Of one seed
    nothing is known of others."""
    if found is None or found.seeds < 2:
        return None
    interval, ratio = found.interval(level), found.ratio
    if interval is None or not all(map(math.isfinite, interval)):
        return None
    low, high = interval
    if bound.kind == "above":
        return True if low > bound.value else False if high < bound.value else None
    if bound.kind == "below":
        return True if high < bound.value else False if low > bound.value else None
    least, most = -bound.value, bound.value
    if ratio:
        least, most = 1 / (1 + bound.value), 1 + bound.value
    if least < low and high < most:
        return True
    return False if low > most or high < least else None

"""Means over latents, with their intervals, bounds and the number of latents that one would need.

Definitions: docs/interp.md. The population is a coder's latents that fire often enough to be
scored; what others and unscored latents could change is in the bounds.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from bsc.eval.evaluation import Interval
from bsc.eval.figures.intervals import LEVEL, MIN_SAMPLE
from bsc.eval.interp.sampling import Chosen, Design
from bsc.eval.interp.scores import LatentScore, RatePoint, SampledMean, SampledMeans
from bsc.typed import combined

__all__ = ["POWER", "estimate", "frequency_adjusted", "latents_needed", "summary"]

POWER = 0.8
_RESAMPLES = 2_000
DIFFERENCE = 0.02
"""The difference between two coders that the power line speaks of."""
MAX_CURVE = 24
MISSING = 0.02
"""Share of what was not scored above which bounds are shown."""


def summary(
    scores: Mapping[int, LatentScore],
    chosen: Chosen,
    counts: NDArray[np.int64],
    rows: int,
    key: str,
) -> SampledMeans:
    """Both means of one figure of one test over the latents of a coder.

    Args:
        scores: by latent; of a latent that was not asked about at all there may be none.
        chosen: the samples.
        counts: (F,) firings of each latent.
        rows: rows that were evaluated.
        key: the figure: ``"score"``, ``"f1"`` or ``"auc"``.
    """
    found: dict[str, SampledMean] = {}
    some: dict[str, Any] = {}
    for name, design in chosen._asdict().items():
        values = [scores.get(int(i)) for i in design.latent]
        score, low, high, noise = (
            np.array([_number(v and v.get(field)) for v in values])
            for field in (key, "low", "high", "noise")
        )
        found[name] = estimate(design, score, noise)
        if key == "score":
            found[name] = combined(SampledMean, found[name], **_bounds(design, score, low, high))
            if name == "weighted":
                rates = counts[design.latent] / rows
                some["curve"] = frequency_adjusted(design, score, noise, rates)
    return SampledMeans(unweighted=found["unweighted"], weighted=found["weighted"], **some)


def _number(value: Any) -> float:
    return np.nan if value is None else float(value)


def _resampled(
    design: Design,
    values: NDArray[np.float64],
    noise: NDArray[np.float64],
    parts: NDArray[np.bool_],
    seed: int,
) -> NDArray[np.float64]:
    """(resamples, columns) means over the latents of each column of `parts`.

    Latents that were drawn are drawn again. Those of a census would be the same in any sample: of
    them what their excerpts could have shown otherwise is drawn, from a normal distribution.
    """
    rng = np.random.Generator(np.random.Philox(key=seed))
    drawn = ~design.census
    n = int(drawn.sum())
    w = design.weight[:, None] * parts
    times = (
        rng.multinomial(n, np.full(n, 1 / n), size=_RESAMPLES) if n else np.zeros((_RESAMPLES, 0))
    )
    jitter = rng.standard_normal((_RESAMPLES, int(design.census.sum()))) * noise[design.census]
    top = times @ (w * values[:, None])[drawn] + (values[design.census] + jitter) @ w[design.census]
    bottom = times @ w[drawn] + w[design.census].sum(axis=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(top / bottom)


def _sizes(design: Design, parts: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Latents that the interval of each column rests on: those that were drawn, if any."""
    drawn = parts[~design.census].sum(axis=0)
    return np.asarray(np.where(drawn > 0, drawn, parts.sum(axis=0)))


def _widened_quantiles(n: int) -> tuple[float, float]:
    """Quantiles of the resampled means of n latents between which the interval lies.

    With few latents the percentile interval of a bootstrap is too short; its quantiles are moved
    outwards by the ratio of Student's t to the normal distribution (Hesterberg 2015, "What teachers
    should know about the bootstrap", section 5.3, the expanded percentile interval).

    >>> [round(q, 4) for n in (10, 10**6) for q in _widened_quantiles(n)]
    [0.0086, 0.9914, 0.025, 0.975]
    """
    t = stats.t.ppf((1 - LEVEL) / 2, n - 1) * np.sqrt(n / (n - 1))
    low = float(stats.norm.cdf(t))
    return low, 1 - low


def _intervals(resampled: NDArray[np.float64], sizes: NDArray[np.int64]) -> list[Interval]:
    found: list[Interval] = []
    for column, n in zip(resampled.T, sizes, strict=True):
        if n < MIN_SAMPLE or np.isnan(column).mean() > 0.01:
            found.append(None)
            continue
        low, high = np.nanquantile(column, _widened_quantiles(int(n)))
        found.append([float(low), float(high)])
    return found


def estimate(
    design: Design, values: NDArray[np.float64], noise: NDArray[np.float64], *, seed: int = 0
) -> SampledMean:
    """The weighted mean of the latents that have a score (Hajek's estimator), with its interval.

    Args:
        design: the sample.
        values: (latents of the sample,) NaN where there is none.
        noise: standard error of each by its excerpts.
        seed: of the resampling.
    """
    there = np.isfinite(values)
    if not there.any():
        return SampledMean(mean=None, interval=None, latents=0, sd=None, needed=None)
    kept = design._replace(
        latent=design.latent[there], weight=design.weight[there], census=design.census[there]
    )
    v, w = values[there], kept.weight
    noise = np.nan_to_num(noise[there])
    every = np.ones((len(v), 1), bool)
    interval = _intervals(_resampled(kept, v, noise, every, seed), _sizes(kept, every))[0]
    mean = float((w * v).sum() / w.sum())
    # What varies in another sample: latents that were drawn; of a census their excerpts.
    drawn = v[~kept.census]
    sd = float(drawn.std(ddof=1)) if len(drawn) > 1 else None
    needed = None if sd is None else latents_needed(sd)
    return SampledMean(mean=mean, interval=interval, latents=len(v), sd=sd, needed=needed)


def latents_needed(sd: float, difference: float = DIFFERENCE) -> int:
    """Latents of each of two coders so that a difference of means is found with 80 % power at 95 %.

    n = 2 (z(.975) + z(.8))^2 sd^2 / difference^2, of independent samples.

    >>> latents_needed(0.12)
    566
    """
    z = stats.norm.ppf(1 - (1 - LEVEL) / 2) + stats.norm.ppf(POWER)
    return int(np.ceil(2 * (z * sd / difference) ** 2))


def _bounds(
    design: Design, score: NDArray[np.float64], low: NDArray[np.float64], high: NDArray[np.float64]
) -> dict[str, Any]:
    """What share has a score, and what the mean would be, were all the rest wrong or right."""
    w = design.weight
    total = w.sum()
    if not total:
        return {"coverage": 0.0, "bounds": [0.0, 1.0]}
    there = np.isfinite(score)
    inside = 1 - design.left_out
    # A latent with a score may still lack some answers; one without has all to win or to lose.
    bottom = float((w * np.where(there, low, 0.0)).sum() / total) * inside
    top = float((w * np.where(there, high, 1.0)).sum() / total) * inside + design.left_out
    return {"coverage": float(w[there].sum() / total) * inside, "bounds": [bottom, top]}


def frequency_adjusted(
    design: Design,
    score: NDArray[np.float64],
    noise: NDArray[np.float64],
    rates: NDArray[np.float64],
    *,
    seed: int = 0,
) -> list[RatePoint]:
    """Score of all firings of latents at or below a rate, against that rate.

    Args:
        design: the sample that was drawn in proportion to the rate.
        score: of each latent, NaN where there is none.
        noise: standard error of each by its excerpts.
        rates: firing rate of each.
        seed: of the resampling.

    Returns:
        Points at up to 24 rates.
    """
    there = np.isfinite(score)
    if not there.any():
        return []
    kept = design._replace(
        latent=design.latent[there], weight=design.weight[there], census=design.census[there]
    )
    v, p, w = score[there], rates[there], kept.weight
    levels = np.unique(p)
    if len(levels) > MAX_CURVE:
        levels = np.unique(np.quantile(p, np.linspace(0, 1, MAX_CURVE), method="higher"))
    parts = p[:, None] <= levels[None, :]
    resampled = _resampled(kept, v, np.nan_to_num(noise[there]), parts, seed)
    intervals = _intervals(resampled, _sizes(kept, parts))
    return [
        RatePoint(
            rate=float(level),
            score=float((w * v)[inside].sum() / w[inside].sum()),
            interval=interval,
            share=float(w[inside].sum() / w.sum()),
        )
        for level, inside, interval in zip(levels, parts.T, intervals, strict=True)
    ]

"""How many bits a code takes per token, and comparisons at equal L0 or equal bits.

    bits = sum_i H(p_i) + sum_i p_i H(value_i | i fires)        the second for continuous latents

p_i is the firing rate, H the entropy in bits. The first sum is what it takes to say which latents
fire when each is coded by itself: an upper bound of the code's entropy, which a model of how
latents depend on each other could lower. Values are quantised first (passes/controls.py), for a
real number has no size in bits; fvu_quantised is the FVU that belongs to that rate.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from bsc.eval.evaluation import Bits, CoderFigures
from bsc.eval.passes.codes import LatentCode

__all__ = ["Matched", "binary_entropy", "bit_figures", "interpolated", "matched", "value_entropies"]


def binary_entropy(p: NDArray[np.float64]) -> NDArray[np.float64]:
    """Entropy in bits of events of probability p; 0 where p is 0 or 1.

    >>> binary_entropy(np.array([0.0, 0.5, 1.0])).tolist()
    [0.0, 1.0, 0.0]
    """
    p = np.asarray(p, np.float64)
    inside = (p > 0) & (p < 1)
    q = np.where(inside, p, 0.5)
    return np.where(inside, -(q * np.log2(q) + (1 - q) * np.log2(1 - q)), 0.0)


def value_entropies(code: LatentCode, step: NDArray[np.float64]) -> NDArray[np.float64]:
    """Entropy in bits of each latent's quantised value when it fires, (F,), from the sample itself.

    Args:
        code: sorted by latent; `margin` is the value.
        step: (F,) of the quantiser; a latent of step 0 has entropy 0.
    """
    entropies = np.zeros(code.n_latents)
    for first, last in code.ranges():
        here = slice(int(code.offsets[first]), int(code.offsets[last]))
        n = np.diff(code.offsets[first : last + 1])
        latent = np.repeat(np.arange(last - first), n)
        size = step[first:last][latent]
        level = np.zeros(len(latent), np.int64)
        coded = size > 0
        level[coded] = np.floor(code.margin[here][coded] / size[coded]).astype(np.int64)
        pair, count = np.unique((latent << 40) + level, return_counts=True)
        latent = pair >> 40
        share = count / n[latent]
        np.add.at(entropies[first:last], latent, -share * np.log2(share))
    return entropies


def bit_figures(
    code: LatentCode, rows: int, first_binary: int, step: NDArray[np.float64] | None
) -> Bits:
    """Size of a code in bits per token.

    Args:
        code: sorted by latent.
        rows: rows that were evaluated.
        first_binary: latents from this one on have no value.
        step: (F,) quantisation steps; None for a binary code.
    """
    rates = np.diff(code.offsets) / rows
    firing = float(binary_entropy(rates).sum())
    values = 0.0
    if step is not None:
        steps = np.where(np.arange(len(rates)) < first_binary, step, 0.0)
        values = float((rates * value_entropies(code, steps)).sum())
    return Bits(bits=firing + values, bits_firing=firing, bits_values=values)


def interpolated(points: Sequence[tuple[float, float]], at: float) -> float | None:
    """The value at `at` on the line through points, linear in log2 of the first coordinate.

    Args:
        points: (L0 or bits, figure) of coders that differ in k alone.
        at: where; None comes back outside of the points, for nothing is extrapolated.

    >>> interpolated([(8, 0.4), (32, 0.2)], 16)
    0.30000000000000004
    """
    inside = sorted(p for p in points if p[0] > 0)
    if not inside or not inside[0][0] <= at <= inside[-1][0]:
        return None
    x, y = np.log2([p[0] for p in inside]), [p[1] for p in inside]
    return float(np.interp(np.log2(at), x, y))


class Matched(NamedTuple):
    """A figure of a binary coder beside that of others at the same L0 or the same bits."""

    at: float
    binary: float
    other: float


def matched(
    binary: Sequence[CoderFigures], others: Sequence[CoderFigures], by: str, figure: str
) -> list[Matched]:
    """Figures of binary coders beside those of others at the same L0 or the same bits.

    Args:
        binary: figures of coders that differ in k alone.
        others: the same of another code.
        by: ``"l0"`` or ``"bits"``.
        figure: what is compared, such as ``"fvu"``.

    Returns:
        One entry for each binary coder within the range of the others.
    """
    points = [(float(f[by]), float(f[figure])) for f in others]
    found = []
    for f in sorted(binary, key=lambda f: float(f[by])):
        other = interpolated(points, f[by])
        if other is not None:
            found.append(Matched(f[by], f[figure], other))
    return found

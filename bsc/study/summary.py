"""Estimates in a few words, for the page, the plots and the table on a terminal."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from bsc.study.results import ClaimResult, PartResult, Shown

__all__ = ["Summary", "claim_summary", "decimals", "summary", "word_of", "written"]


class Summary(NamedTuple):
    """The estimates of some cells, in a few words."""

    value: str
    """Of one cell, or from the least to the largest."""
    interval: str
    what: str = ""
    """Whether it is a difference, a ratio or a figure, and of what."""


def decimals(cells: Iterable[Shown]) -> int:
    """Digits behind the point that show two digits of the narrowest interval.

    >>> cell = Shown.model_construct(value=0.51234, interval=[0.5, 0.525])
    >>> decimals([cell])
    3
    """
    sizes = []
    for cell in cells:
        if cell.interval is not None:
            sizes.append(cell.interval[1] - cell.interval[0])
        elif cell.value is not None:
            sizes.append(abs(cell.value) / 10)
    sizes = [s for s in sizes if s > 0 and math.isfinite(s)]
    return max(0, 1 - math.floor(math.log10(min(sizes)))) if sizes else 3


def written(value: float | None, digits: int) -> str:
    """A number with so many digits behind the point; very small and very large ones have three.

    >>> written(-1234.5, 1), written(0.0000001234, 9), written(None, 3)
    ('-1,234.5', '1.23e-07', '-')
    """
    if value is None or not math.isfinite(value):
        return "-"
    return f"{value:,.{digits}f}" if digits <= 6 and abs(value) < 1e9 else f"{value:.3g}"


def word_of(part: PartResult) -> str:
    """Whether a contrast is a figure, a ratio or a difference."""
    if all(cell.against is None for cell in part.cells):
        return "figure"
    return "ratio" if part.ratio else "difference"


def summary(cells: Sequence[Shown], what: str = "") -> Summary:
    """One estimate with its interval, or how far several go.

    >>> cell = Shown.model_construct(value=0.51234, interval=[0.5, 0.525])
    >>> summary([cell], "fvu")
    Summary(value='0.512', interval='0.500 to 0.525', what='fvu')
    """
    digits = decimals(cells)
    values = [c.value for c in cells if c.value is not None]
    ends = [e for c in cells if c.interval is not None for e in c.interval]
    if not values:
        return Summary("-", "no figure", what)

    def spanned(numbers: Sequence[float]) -> str:
        return f"{written(min(numbers), digits)} to {written(max(numbers), digits)}"

    interval = spanned(ends) if ends else "no interval"
    if len(cells) == 1:
        return Summary(written(values[0], digits), interval, what)
    return Summary(spanned(values), f"intervals {interval}" if ends else interval, what)


def claim_summary(claim: ClaimResult) -> Summary | None:
    """Estimates of the first contrast that has the claim's own verdict; None: nothing was measured.

    Of a claim that does not hold it is thus one that does not, though others may.
    """
    bounded = [p for p in claim.parts if p.bound is not None]
    alike = [p for p in bounded if p.verdict == claim.verdict]
    part = next(iter(alike or bounded or claim.parts), None)
    if part is None:
        return None
    word, cells = word_of(part), len(part.cells)
    of = "" if word == "figure" else f"{word} of "
    weighted = ", weighted by firings" if part.weighted else ""
    over = f", {cells} cells" if cells > 1 else ""
    return summary(part.cells, f"{of}{part.figure}{weighted}{over}")

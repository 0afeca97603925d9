"""The plot of a contrast: one interval above the other, beside the bound that they are claimed to
keep to.

Text from a study's file is drawn as it is: no mathematics is read into it, and what would act on a
page is shown (bsc/formats.py).
"""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from bsc.eval.report.drawing import COLOURS, INK, Drawing, panels
from bsc.formats import printable
from bsc.study.results import ClaimResult, PartResult, Shown
from bsc.study.summary import decimals, written

__all__ = ["MOST_ROWS", "claimed_words", "cut_off", "drawable", "forest", "forest_of", "place",
           "variants_drawn"]  # fmt: skip

MOST_ROWS = 48
"""Rows of a plot up to which other ways of measuring are drawn beside the cells."""
_WIDTH = 4.4
"""In inches: on a phone its letters are still large enough to be read."""
_LABEL = 24
"""Characters of a line of a label: wider ones would leave the axis too little."""
_LINE = 0.15
"""Height of a line of text in inches."""
_FRAME = 0.66
"""Height of what is below the axis, in inches: its numbers and its label."""
_REACH = 6
"""An interval is cut off where it leaves the estimates by so many times the middle half-width."""


def place(cell: Shown) -> str:
    """What a cell is of, in words."""
    return ", ".join(f"{name} = {value}" for name, value in cell.where.items()) or "all coders"


def drawable(part: PartResult) -> bool:
    """Whether any cell has an estimate."""
    return any(cell.value is not None for cell in part.cells)


def claimed_words(part: PartResult) -> str:
    """What is claimed of a contrast that has a bound.

    >>> claimed_words(PartResult.model_construct(bound="within 0.1", ratio=True))
    'within a factor of 1.1'
    """
    kind, _, text = str(part.bound).partition(" ")
    if kind != "within":
        return str(part.bound)
    return f"within a factor of {1 + float(text):g}" if part.ratio else f"within {text} of 0"


def cut_off(part: PartResult) -> bool:
    """Whether an interval goes on beyond the axis."""
    cells = [row.cell for row in _rows(part)]
    low, high = _limits(part, cells)
    return any(c.interval is not None and (c.interval[0] < low or c.interval[1] > high)
               for c in cells)  # fmt: skip


def variants_drawn(part: PartResult) -> bool:
    """Whether there are other ways of measuring that belong on the axis, and few enough of them."""
    drawn = [v for v in part.variants if v.comparable]
    return bool(drawn) and len(part.cells) + sum(len(v.cells) for v in drawn) <= MOST_ROWS


class _Row(NamedTuple):
    """An interval of the plot."""

    label: str
    cell: Shown
    variant: bool


def _rows(part: PartResult) -> list[_Row]:
    rows = [_Row(place(cell), cell, False) for cell in part.cells]
    if variants_drawn(part):
        for variant in (v for v in part.variants if v.comparable):
            for cell in variant.cells:
                of = f", {place(cell)}" if len(variant.cells) > 1 else ""
                rows.append(_Row(f"{variant.words}{of}", cell, True))
    return rows


def _lines(label: str) -> list[str]:
    """A label in lines; a field stays beside its value where a line has room for both.

    >>> _lines("k = 8, site = mlp, n_latents = 16384")
    ['k = 8, site = mlp,', 'n_latents = 16384']
    """

    def kept(found: re.Match[str]) -> str:
        return found[0].replace(" ", "\u00a0") if len(found[0]) <= _LABEL else found[0]

    text = re.sub(r"\S+ = \S+", kept, printable(label))
    return [n.replace("\u00a0", " ") for n in textwrap.wrap(text, _LABEL)] or ["-"]


def forest(name: str, part: PartResult, words: str) -> Drawing:
    """Estimates with their intervals, one row a cell, and other ways of measuring below them.

    Args:
        name: of the drawing.
        part: a contrast of which some cell has an estimate.
        words: what it is of, for those who cannot see it.
    """
    rows = _rows(part)
    labels = [_lines(r.label) for r in rows]
    middles: list[float] = []
    ticks: list[tuple[float, str]] = []
    y = 0.3
    for number, (row, lines) in enumerate(zip(rows, labels, strict=True)):
        if row.variant and not rows[number - 1].variant:
            y += 0.8  # apart from what the verdict is of
        height = len(lines) + 0.7
        middles.append(y + height / 2)
        first = middles[-1] - (len(lines) - 1) / 2
        ticks += [(first + i, line) for i, line in enumerate(lines)]
        y += height
    y += 0.3
    with panels(1, y * _LINE + _FRAME) as (figure, (axis,)):
        figure.set_size_inches(_WIDTH, y * _LINE + _FRAME)
        low, high = _limits(part, [r.cell for r in rows])
        _scale(axis, part.ratio, low, high)
        _bound(axis, part, low, high)
        for row, middle in zip(rows, middles, strict=True):
            _interval(axis, row, middle, low, high)
        axis.set_ylim(y, 0)
        axis.grid(visible=False, axis="y")
        axis.spines["left"].set_visible(False)
        # A tick for each line of a label: so it ends at the axis whatever font the page has.
        axis.set_yticks([at for at, _ in ticks], [line for _, line in ticks])
        axis.tick_params(axis="y", length=0, labelsize=8.5)
        axis.tick_params(axis="x", labelsize=8.5)
        axis.set_xlabel(printable(_measured(part)), fontsize=8.5)
        for text in (*axis.get_yticklabels(), axis.xaxis.label):
            text.set_parse_math(False)
        return Drawing(name, _alt(part, rows, words), figure)


def forest_of(claim: ClaimResult, number: int) -> Drawing:
    """The plot of a part of a claim, the first of which is number 1."""
    part = claim.parts[number - 1]
    words = part.words or part.contrast
    stop = "" if words.endswith((".", "!", "?")) else "."
    return forest(f"forest-{claim.id}-{number}", part, f"{words}{stop}")


def _measured(part: PartResult) -> str:
    """What the axis is of."""
    figure = part.figure + (", weighted by firings" if part.weighted else "")
    if all(cell.against is None for cell in part.cells):
        return figure
    return f"{'ratio' if part.ratio else 'difference'} of {figure}"


def _claimed(part: PartResult) -> tuple[float, float] | None:
    """From where to where the estimates are claimed to be."""
    if part.bound is None:
        return None
    kind, _, text = part.bound.partition(" ")
    value = float(text)
    if kind == "above":
        return value, math.inf
    if kind == "below":
        return -math.inf, value
    return (1 / (1 + value), 1 + value) if part.ratio else (-value, value)


def _neutral(part: PartResult) -> float | None:
    """Where both sides are equal; None: there is one side only."""
    if all(cell.against is None for cell in part.cells):
        return None
    return 1.0 if part.ratio else 0.0


def _on_axis(values: Iterable[float], ratio: bool) -> list[float]:
    """Places on the axis, which of a ratio is logarithmic, of what has one."""
    found = [v for v in values if math.isfinite(v)]
    return [math.log10(v) for v in found if v > 0] if ratio else found


def _limits(part: PartResult, cells: Sequence[Shown]) -> tuple[float, float]:
    """Ends of the axis: all estimates, the bound, and intervals but for those far wider than the
    others."""
    marks = [c.value for c in cells if c.value is not None]
    marks += [*(_claimed(part) or ())]
    neutral = _neutral(part)
    marks += [] if neutral is None else [neutral]
    places = _on_axis(marks, part.ratio) or [0.0]
    ends = [_on_axis(c.interval, part.ratio) for c in cells if c.interval is not None]
    halves = [(pair[1] - pair[0]) / 2 for pair in ends if len(pair) == 2]
    low, high = min(places), max(places)
    if halves:
        reach = _REACH * float(np.median(halves))
        every = [e for pair in ends for e in pair]
        low = min(low, max(min(every), low - reach))
        high = max(high, min(max(every), high + reach))
    margin = 0.06 * (high - low) or (0.1 if part.ratio else abs(high) or 1.0)
    low, high = low - margin, high + margin
    # A ratio of more than any float holds is cut off.
    return (10.0 ** max(low, -300), 10.0 ** min(high, 300)) if part.ratio else (low, high)


def _scale(axis: Axes, ratio: bool, low: float, high: float) -> None:
    if ratio:
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(FixedLocator(_ratio_ticks(low, high)))
        axis.xaxis.set_minor_locator(NullLocator())
    else:
        axis.xaxis.set_major_locator(MaxNLocator(4))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_xlim(low, high)


def _ratio_ticks(low: float, high: float) -> list[float]:
    """A few numbers that are easily read, within a span of ratios."""
    decades = math.log10(high) - math.log10(low)
    if decades < 0.6:
        found = [float(t) for t in MaxNLocator(4).tick_values(low, high)]
    else:
        step = max(1, math.ceil(decades / 5))
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        parts = (1, 2, 5) if decades < 2.5 else (1,)
        found = [part * 10.0**p for p in powers if p % step == 0 for part in parts]
    return [t for t in found if low <= t <= high]


def _bound(axis: Axes, part: PartResult, low: float, high: float) -> None:
    """The bound, the side of it that is claimed, and where both sides are equal."""
    neutral, claimed = _neutral(part), _claimed(part)
    if neutral is not None and neutral not in (claimed or ()):
        axis.axvline(neutral, color=INK, lw=0.8, alpha=0.55)
    if claimed is None:
        return
    axis.axvspan(max(claimed[0], low), min(claimed[1], high), color=COLOURS["continuous"],
                 alpha=0.14, lw=0)  # fmt: skip
    for end in claimed:
        if math.isfinite(end):
            axis.axvline(end, color=COLOURS["continuous"], lw=1.2, ls="--")


def _interval(axis: Axes, row: _Row, y: float, low: float, high: float) -> None:
    """A mark with its interval, which ends in an arrow where it leaves the axis."""
    cell, alpha = row.cell, 0.62 if row.variant else 1.0
    if cell.value is None:
        axis.text(0.5, y, "no figure", transform=axis.get_yaxis_transform(), fontsize=8.5,
                  ha="center", va="center", style="italic")  # fmt: skip
        return
    if cell.interval is not None:
        start, end = cell.interval
        axis.plot([max(start, low), min(end, high)], [y, y], color=INK, alpha=alpha,
                  lw=1.0 if row.variant else 1.7, solid_capstyle="butt")  # fmt: skip
        for cut, at, mark in ((start < low, low, "<"), (end > high, high, ">")):
            if cut:
                axis.plot([at], [y], marker=mark, ms=5, color=INK, alpha=alpha, clip_on=False)
    axis.plot([cell.value], [y], marker="o" if row.variant else "s", ms=4 if row.variant else 5.5,
              color=INK, mfc="none" if row.variant else INK, alpha=alpha)  # fmt: skip


def _alt(part: PartResult, rows: Sequence[_Row], words: str) -> str:
    digits = decimals(r.cell for r in rows)
    said = []
    for row in rows:
        cell = row.cell
        if cell.value is None:
            found = "no figure"
        elif cell.interval is None:
            found = f"{written(cell.value, digits)}, no interval"
        else:
            ends = " to ".join(written(e, digits) for e in cell.interval)
            found = f"{written(cell.value, digits)} ({ends})"
        said.append(f"{row.label}: {found}")
    claimed = (
        "nothing is claimed of it" if part.bound is None else f"claimed to be {claimed_words(part)}"
    )
    return (
        f"{words} {_measured(part)[:1].upper()}{_measured(part)[1:]}, {claimed}; 95 % intervals in "
        f"brackets. {'; '.join(said)}."
    )

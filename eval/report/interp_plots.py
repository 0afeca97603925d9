"""The plots of interpretability scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter

from bsc.eval.report.coders import ReportedCoder, by_panel
from bsc.eval.report.drawing import (
    COLOURS,
    INK,
    MARKERS,
    Drawing,
    left_label,
    one_legend,
    panels,
)
from bsc.eval.report.interp import Scored, ScoreSet

__all__ = ["frequency_curves", "scores"]


def scores(scored: Scored, rows: Sequence[ReportedCoder]) -> Drawing:
    """Unweighted and weighted means against k, one panel per kind of score."""
    own = [r for r in rows if r.run == scored.run]
    places = [
        (one, panel, members)
        for one in scored.sets
        for panel, members in by_panel([r for r in own if r.name in one.coders]).items()
    ]
    many = len(by_panel(own)) > 1
    words = []
    with panels(max(1, len(places)), 2.9) as (figure, axes):
        for axis, (one, panel, members) in zip(axes, places, strict=False):
            title = f"{one.title}\n{panel}" if many else one.title
            words.append(f"{title}:")
            single = len({r.k for r in members}) == 1
            place = 0
            for design, dashed in (("unweighted", False), ("weighted", True)):
                for code in dict.fromkeys(r.code for r in members):
                    of_code = [r for r in members if r.code == code]
                    words += _draw(axis, one, of_code, design, dashed, place if single else None)
                    place += 1
            axis.axhline(one.chance, color=INK, lw=0.7, ls=":", alpha=0.6)
            ks = sorted({r.k for r in members})
            if len(ks) == 1:  # no axis of k: a place for each mean, named below
                codes = dict.fromkeys(r.code for r in members)
                axis.set_xticks(range(2 * len(codes)), [
                    f"{code}\n{design}" for design in ("unweighted", "weighted") for code in codes
                ])  # fmt: skip
                axis.set_xlim(-0.6, 2 * len(codes) - 0.4)
                axis.set_xlabel(f"k = {ks[0]}")
            else:
                axis.set_xscale("log", base=2)
                axis.set_xticks(ks, [str(k) for k in ks])
                axis.set_xlabel("k, latents selected per token")
            axis.minorticks_off()
            axis.set_title(title)
        left_label(axes, "score")
        # Of a single k the names stand on the axis.
        if any(len({r.k for r in members}) > 1 for _, _, members in places):
            one_legend(figure, axes)
        return Drawing(
            scored.anchor, f"{scored.heading}, means over latents. {' '.join(words)}", figure
        )


def _draw(
    axis: Axes, one: ScoreSet, members: list[ReportedCoder], design: str, dashed: bool,
    place: int | None,
) -> list[str]:  # fmt: skip
    """Marks of the coders of one code, over k, or at one place where there is a single k."""
    points = []
    for row in members:
        found = one.coders[row.name][design]
        if found.mean is not None:
            points.append((row.k, found.mean, found.interval or [found.mean] * 2))
    if not points:
        return []
    code = members[0].code
    colour = COLOURS[code]
    # Beside each other, so that bars at one k can be told apart.
    shift = {("continuous", False): 0.94, ("continuous", True): 0.98, ("binary", False): 1.02,
             ("binary", True): 1.06}.get((code, dashed), 1.0)  # fmt: skip
    points.sort()
    x = [k * shift if place is None else float(place) for k, _, _ in points]
    y = [m for _, m, _ in points]
    errors = [
        [max(0.0, m - i[0]) for _, m, i in points],
        [max(0.0, i[1] - m) for _, m, i in points],
    ]
    style: dict[str, Any] = {
        "color": colour, "marker": MARKERS[code], "ms": 4.5, "mfc": "none" if dashed else colour,
    }  # fmt: skip
    line = "--" if dashed else "-"
    # Lines join the means over seeds; every coder is a mark.
    if place is None:
        ks = sorted(set(x))
        means = [np.mean([m for other, m in zip(x, y, strict=True) if other == k]) for k in ks]
        axis.plot(ks, means, color=colour, ls=line, lw=1.2)
    axis.errorbar(x, y, yerr=errors, **style, ls="none", elinewidth=0.9, capsize=2)
    axis.plot([], [], **style, ls=line, lw=1.2, label=f"{code}, {design}")
    low, high = f"{min(y):.3f}", f"{max(y):.3f}"
    return [f"{code} {design} {low}{f' to {high}' if high != low else ''};"]


def frequency_curves(scored: Scored, rows: Sequence[ReportedCoder]) -> list[Drawing]:
    """Score of all firings of latents up to a rate, against that rate, one panel per k."""
    found = []
    for one in scored.sets:
        own = [r for r in rows if r.run == scored.run and one.curve(r.name)]
        grouped: dict[str, list[ReportedCoder]] = {}
        for row in own:
            grouped.setdefault(f"{row.panel}, k = {row.k}", []).append(row)
        if grouped:
            found.append(_curves(scored, one, grouped))
    return found


def _curves(scored: Scored, one: ScoreSet, grouped: dict[str, list[ReportedCoder]]) -> Drawing:
    many = len({r.panel for members in grouped.values() for r in members}) > 1
    words = []
    with panels(len(grouped), 2.4) as (figure, axes):
        for axis, (title, members) in zip(axes, grouped.items(), strict=True):
            for row in members:
                curve = one.curve(row.name)
                x, y = [p.rate for p in curve], [p.score for p in curve]
                colour = COLOURS[row.code]
                axis.plot(x, y, color=colour, lw=1.4, drawstyle="steps-post",
                          label=row.code if row.seed == members[0].seed else None)  # fmt: skip
                axis.plot(x[-1:], y[-1:], color=colour, marker=MARKERS[row.code], ms=4)
                bars = [(p.rate, *p.interval) for p in curve if p.interval]
                if bars:
                    axis.fill_between([b[0] for b in bars], [b[1] for b in bars],
                                      [b[2] for b in bars], color=colour, alpha=0.13, lw=0,
                                      step="post")  # fmt: skip
                words.append(f"{title}, {row.code}: {y[0]:.3f} at {x[0]:.2g}, {y[-1]:.3f} in all;")
            axis.axhline(one.chance, color=INK, lw=0.7, ls=":", alpha=0.6)
            axis.set_xscale("log")
            axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axis.minorticks_off()
            axis.set_title(title if many else f"k = {members[0].k}")
            axis.set_xlabel("firing rate up to")
        left_label(axes, "score")
        one_legend(figure, axes)
        return Drawing(
            f"{scored.anchor}-{one.kind}-rates",
            f"{scored.heading}, {one.title}, of all firings of latents up to a rate. "
            f"{' '.join(words)}",
            figure,
        )

"""The plots of the report."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator

from bsc.eval.evaluation import Ablation, Probing
from bsc.eval.figures.firing import ULTRA
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

__all__ = ["ablations", "curves", "firing_histograms", "probing", "training_curves"]


class Curve(NamedTuple):
    """One figure of eval.json to draw, of coders of some codes."""

    key: str
    codes: tuple[str, ...] = ("continuous", "binary", "hybrid")
    interval: str | None = None
    label: str = "{code}"
    dashed: bool = False


def curves(
    name: str,
    rows: Sequence[ReportedCoder],
    x: Callable[[ReportedCoder], float],
    x_label: str,
    y_label: str,
    what: Sequence[Curve],
) -> Drawing:
    """Figures against something on a log scale, one panel per hookpoint, site and width.

    Lines join the means over seeds, one line per run and variant; every coder is a mark, with its
    interval where there is one.
    """
    grouped = by_panel(rows)
    words = []
    with panels(len(grouped), 2.9) as (figure, axes):
        for axis, (panel, members) in zip(axes, grouped.items(), strict=True):
            words.append(f"{panel}:")
            for curve in what:
                for code in curve.codes:
                    of_code = [c for c in members if c.code == code and curve.key in c.figures]
                    if of_code:
                        label = curve.label.format(code=code)
                        _draw(axis, of_code, curve, x, label)
                        words.append(f"{label} {_extent([c.figures[curve.key] for c in of_code])};")
            ticks = sorted({x(c) for c in members})
            axis.set_xscale("log", base=2)
            if all(float(t).is_integer() for t in ticks) and len(ticks) < 9:
                axis.set_xticks(ticks, [f"{t:,.0f}" for t in ticks])
            else:
                axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
            axis.minorticks_off()
            axis.set_xlabel(x_label)
            axis.set_title(panel)
        if axes[0].get_ylim()[0] > 0:
            axes[0].set_ylim(bottom=0)
        left_label(axes, y_label)
        one_legend(figure, axes)
        return Drawing(name, f"{y_label} against {x_label}. {' '.join(words)}", figure)


def _draw(
    axis: Axes,
    of_code: list[ReportedCoder],
    curve: Curve,
    x: Callable[[ReportedCoder], float],
    label: str,
) -> None:
    code = of_code[0].code
    style: dict[str, Any] = {
        "color": COLOURS[code],
        "ls": "--" if curve.dashed else "-",
        "marker": MARKERS[code],
        "ms": 4.5,
        "mfc": "none" if curve.dashed else COLOURS[code],
    }
    for variant in dict.fromkeys(c.variant for c in of_code):
        line = [c for c in of_code if c.variant == variant]
        points = []
        for k in sorted({c.k for c in line}):
            same = [c for c in line if c.k == k]
            points.append(
                (np.mean([x(c) for c in same]), np.mean([c.figures[curve.key] for c in same]))
            )
        axis.plot(*zip(*points, strict=True), **(style | {"marker": ""}), lw=1.6)
    for coder in of_code:
        value = coder.figures[curve.key]
        interval = coder.figures[curve.interval] if curve.interval else None
        low, high = interval or (value, value)
        axis.errorbar(
            [x(coder)],
            [value],
            yerr=[[max(0, value - low)], [max(0, high - value)]],
            **style,
            lw=1,
            capsize=2,
        )
    axis.plot([], [], **style, label=label)


def _extent(values: Sequence[float]) -> str:
    """The range of some numbers in words."""
    low, high = min(values), max(values)
    return f"{low:.3g}" if low == high else f"{low:.3g} to {high:.3g}"


def firing_histograms(rows: Sequence[ReportedCoder]) -> Drawing:
    """Histograms of log10 firing rates, one panel per k, the codes over each other."""
    grouped: dict[str, list[ReportedCoder]] = {}
    for coder in rows:
        grouped.setdefault(f"{coder.panel}, k = {coder.k}", []).append(coder)
    many = len({c.panel for c in rows}) > 1
    # From the rate of a single firing on.
    lowest = float(np.floor(-np.log10(max(c.figures.rows for c in rows)) * 2) / 2)
    words = []
    with panels(len(grouped), 2.3) as (figure, axes):
        for axis, (title, members) in zip(axes, grouped.items(), strict=True):
            for code, colour in COLOURS.items():
                own = [c for c in members if c.code == code]
                if not own:
                    continue
                counts = [c.figures.log10_rate_histogram.counts for c in own]
                edges = own[0].figures.log10_rate_histogram.edges
                mean = np.mean(counts, axis=0)
                axis.stairs(mean, edges, color=colour, lw=1.4, label=code)
                axis.stairs(mean, edges, color=colour, alpha=0.18, fill=True)
                above = _extent([c.figures.latents_above[str(ULTRA)] for c in own])
                words.append(f"{title}, {code}: {above} latents above 10 %;")
            axis.axvline(-1, color=INK, lw=0.8, ls=":", alpha=0.6)
            axis.set_xticks(range(-7, 1, 1), ["1e-7", "", "1e-5", "", "1e-3", "", "0.1", "1"])
            axis.set_xlim(lowest, 0)
            axis.set_yscale("symlog", linthresh=1)
            axis.minorticks_off()
            axis.set_title(title if many else f"k = {members[0].k}")
            axis.set_xlabel("firing rate")
        axes[0].set_yticks([0, 1, 10, 100, 1000, 10000], ["0", "1", "10", "100", "1000", "1e4"])
        # A coder may have no living latent.
        axes[0].set_ylim(0, 2 * max(1.0, *(float(axis.dataLim.ymax) for axis in axes), 1.0))
        left_label(axes, "latents")
        one_legend(figure, axes)
        return Drawing("firing", f"Histograms of firing rates. {' '.join(words)}", figure)


def training_curves(rows: Sequence[ReportedCoder]) -> Drawing:
    """Training FVU against rows seen, one panel per hookpoint, site and width."""
    grouped = by_panel(rows)
    words = []
    with panels(len(grouped), 3.0) as (figure, axes):
        for axis, (panel, members) in zip(axes, grouped.items(), strict=True):
            ks = sorted({c.k for c in members})
            for coder in members:
                rank = ks.index(coder.k) / max(1, len(ks) - 1)
                axis.plot(
                    [m.rows for m in coder.curve],
                    [m.fvu for m in coder.curve],
                    color=COLOURS[coder.code],
                    lw=0.8 + rank,
                    alpha=0.45 + 0.55 * rank,
                    label=f"{coder.code}, k = {coder.k}" if coder.seed == members[0].seed else None,
                )
            last = [c.curve[-1].fvu for c in members if c.curve]
            words.append(f"{panel}: ends at {_extent(last)};" if last else "")
            axis.set_yscale("log")
            axis.yaxis.set_minor_locator(LogLocator(subs=(2, 3, 5)))
            for formatter in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
                formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
            axis.set_xlabel("training rows")
            axis.set_title(panel)
        left_label(axes, "FVU (training)")
        one_legend(figure, axes, 4 if len(axes) > 1 else 3)
        return Drawing("training", f"FVU during training. {' '.join(words)}", figure)


def ablations(rows: Sequence[ReportedCoder]) -> Drawing | None:
    """Loss without bins of latents of equal firing mass, by score, and without random ones."""
    having = [(c, a) for c in rows if (a := c.figures.ablation) and a.bins]
    if not having:
        return None
    grouped: dict[str, list[tuple[ReportedCoder, Ablation]]] = {}
    for coder, ablation in having:
        grouped.setdefault(f"{coder.panel}, k = {coder.k}", []).append((coder, ablation))
    by = having[0][1].score
    score = "firing rate of the bin" if by == "rate" else f"score ({by})"
    many = len({c.panel for c in rows}) > 1
    words = []
    with panels(len(grouped), 2.5) as (figure, axes):
        for axis, (title, members) in zip(axes, grouped.items(), strict=True):
            first = members[0][0]
            for coder, ablation in members:
                label = coder.code if coder.seed == first.seed else None
                said = _ablation(axis, ablation, coder.code, label)
                words.append(f"{title}, {coder.code}: {said};")
            if by == "rate":
                axis.set_xscale("log")
                axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
                axis.minorticks_off()
            axis.set_title(title if many else f"k = {first.k}")
            axis.set_xlabel(score)
        left_label(axes, "added loss, nats")
        one_legend(figure, axes)
        return Drawing("ablation", f"Loss added by turning off bins. {' '.join(words)}", figure)


def _ablation(axis: Axes, ablation: Ablation, code: str, label: str | None) -> str:
    """The bins of one coder, with the mean of the random ones; and what they are, in words."""
    colour = COLOURS[code]
    x, y = [b.score for b in ablation.bins], [b.delta_ce for b in ablation.bins]
    axis.plot(x, y, color=colour, marker=MARKERS[code], ms=4, lw=1.4, label=label)
    for b in ablation.bins:
        if b.delta_ce_interval:
            axis.plot([b.score] * 2, b.delta_ce_interval, color=colour, lw=0.9)
    mean = float(np.mean([b.delta_ce for b in ablation.random]))
    axis.axhline(mean, color=colour, ls=":", lw=1.2)
    return f"{_extent(y)}, random bins {mean:.3g}"


def probing(name: str, found: Probing, rows: Sequence[ReportedCoder], run: str) -> Drawing:
    """Accuracy of sparse probes against the coders' k, with intervals where there are enough texts.

    A column per way of pooling, a row per number of latents that a probe has.
    """
    arms = {
        "sae_bench": "means as they are (SAEBench)",
        "mean": "means, standardised",
        "max": "maxima, standardised",
        "last": "last token, standardised",
    }
    own = [c for c in rows if c.run == run and c.name in found.coders]
    sizes = sorted({int(k) for c in own for k in found.coders[c.name]["sae_bench"]})
    ks = sorted({c.k for c in own})
    words = []
    with panels(len(arms) * len(sizes), 1.9, columns=len(arms)) as (figure, axes):
        for axis, (size, (arm, title)) in zip(
            axes, itertools.product(sizes, arms.items()), strict=True
        ):
            values = []
            for code in dict.fromkeys(c.code for c in own):
                of_code = [c for c in own if c.code == code]
                values += _probed(axis, found, of_code, arm, str(size), len(ks) > 1)
            for i, (side, baseline) in enumerate(found.baselines.items()):
                line = ("--", "-.")[i % 2]
                axis.axhline(
                    baseline[arm][str(size)].accuracy,
                    color=INK,
                    ls=line,
                    lw=1.1,
                    alpha=0.6,
                    label=f"channels of {side}",
                )
            axis.axhline(0.5, color=INK, lw=0.7, ls=":", alpha=0.6)
            axis.set_xscale("log", base=2)
            axis.set_xticks(ks, [str(k) for k in ks])
            axis.minorticks_off()
            if size == sizes[0]:
                axis.set_title(title)
            if size == sizes[-1]:
                axis.set_xlabel("k, latents selected per token")
            else:
                axis.tick_params(labelbottom=False)
            words.append(f"{title}, {size} in the probe: {_extent(values)};")
        for row, size in enumerate(sizes):
            left_label(axes[row * len(arms) :][: len(arms)], f"accuracy, {size} in the probe")
        one_legend(figure, axes)
        return Drawing(f"probing-{name}", f"Sparse probing. {' '.join(words)}", figure)


def _probed(
    axis: Axes,
    found: Probing,
    of_code: list[ReportedCoder],
    arm: str,
    size: str,
    joined: bool,
) -> list[float]:
    """Accuracies of the coders of one code; the line joins means over seeds and variants."""
    code = of_code[0].code
    shift = {"continuous": 0.97, "binary": 1.03}.get(code, 1.0)  # beside each other
    points: dict[int, list[float]] = {}
    for coder in of_code:
        one = found.coders[coder.name][arm][size]
        value = one.accuracy
        low, high = one.interval or (value, value)
        points.setdefault(coder.k, []).append(value)
        axis.errorbar(
            [coder.k * shift],
            [value],
            yerr=[[max(0, value - low)], [max(0, high - value)]],
            color=COLOURS[code],
            marker=MARKERS[code],
            ms=4,
            lw=1,
            capsize=2,
        )
    ks = sorted(points)
    axis.plot(
        [k * shift for k in ks],
        [np.mean(points[k]) for k in ks],
        color=COLOURS[code],
        marker=MARKERS[code],
        ms=4,
        lw=1.3 if joined else 0,
        label=code,
    )
    return [value for values in points.values() for value in values]

"""The plots of the report, as inline SVG that follows the colours of the page.

The same numbers give the same bytes: no dates, and ids that depend on the name of the plot alone.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

__all__ = ["COLOURS", "CoderRow", "against_k", "firing_histograms", "training_curves"]

COLOURS = {"continuous": "#2f7fc1", "binary": "#d9622b", "hybrid": "#7d55b3"}
"""Apart for every kind of colour vision, and on light and dark ground."""
_MARKERS = {"continuous": "o", "binary": "s", "hybrid": "^"}
_INK = "#010203"  # replaced by currentColor, so that text and axes take the colour of the page
_STYLE: Any = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.grid": True,
    "grid.color": _INK,
    "grid.alpha": 0.12,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    **dict.fromkeys(
        ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), _INK
    ),
}


@dataclass(frozen=True)
class CoderRow:
    """One coder with its config, figures and metrics, as the report shows it."""

    run: str
    name: str
    hookpoint: str
    site: str
    code: str
    k: int
    seed: int
    optimiser: str
    lr: float
    n_latents: int
    figures: dict[str, Any]
    """Of eval.json."""
    metrics: list[dict[str, Any]]
    """Of metrics.jsonl."""
    examples: list[dict[str, Any]]

    @property
    def variant(self) -> tuple[str, ...]:
        """What coders share that differ in k and seed alone: they are one line of a plot."""
        return (self.run, self.name.rsplit("/", 1)[-1].split(f"-s{self.seed}")[-1], self.optimiser)

    @property
    def label(self) -> str:
        """Short name within a panel."""
        return f"{self.code}, k = {self.k}"

    @property
    def panel(self) -> str:
        """What the coders of one panel share."""
        return f"{self.hookpoint}, {self.site.replace('_', ' ')}, {self.n_latents:,} latents"


def _svg(figure: Figure, title: str) -> Markup:
    """The figure as an inline SVG element with a title for screen readers."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].replace(_INK, "currentColor")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    svg = re.sub(r' id="[a-z_]+_\d+"', "", svg)  # figure_1, axes_2: nothing refers to them
    svg = re.sub(r"font: ([^;\"]*?)'?sans-serif'?", r"font: \1inherit", svg)
    alt = str(Markup.escape(title))
    return Markup(svg.replace(">", f' role="img" aria-label="{alt}">', 1))


@contextmanager
def _figure(name: str, panels: int, height: float = 2.7) -> Iterator[tuple[Figure, list[Axes]]]:
    """A figure with up to three panels in a row; four make two rows."""
    columns = 2 if panels == 4 else min(3, panels)
    rows = -(-panels // columns)
    with mpl.rc_context(_STYLE | {"svg.hashsalt": name}):
        width = 3.6 * columns if columns > 1 else 5.2
        figure = Figure(figsize=(width, height * rows), layout="constrained")
        axes = [figure.add_subplot(rows, columns, i + 1) for i in range(panels)]
        yield figure, axes


def _panels(coders: list[CoderRow]) -> dict[str, list[CoderRow]]:
    grouped: dict[str, list[CoderRow]] = {}
    for coder in coders:
        grouped.setdefault(coder.panel, []).append(coder)
    return grouped


def against_k(
    coders: list[CoderRow], key: str, label: str, *, interval: str | None = None
) -> Markup:
    """A figure of eval.json against k, one panel per hookpoint, site and width.

    Lines join the means over seeds, one line per run and variant; every coder is a mark, with its
    interval where there is one.
    """
    grouped = _panels(coders)
    with _figure(f"{key}-against-k", len(grouped), 2.9) as (figure, axes):
        for axis, (panel, members) in zip(axes, grouped.items(), strict=True):
            ks = sorted({c.k for c in members})
            for code, colour in COLOURS.items():
                of_code = [c for c in members if c.code == code]
                for variant in dict.fromkeys(c.variant for c in of_code):
                    line = [c for c in of_code if c.variant == variant]
                    by_k = {k: [c.figures[key] for c in line if c.k == k] for k in ks}
                    points = [(k, float(np.mean(v))) for k, v in by_k.items() if v]
                    axis.plot(*zip(*points, strict=True), color=colour, lw=1.6)
                for coder in of_code:
                    value = coder.figures[key]
                    low, high = coder.figures[interval] if interval else (value, value)
                    axis.errorbar(
                        [coder.k], [value], yerr=[[max(0, value - low)], [max(0, high - value)]],
                        color=colour, marker=_MARKERS[code], ms=4.5, lw=1, capsize=2,
                    )  # fmt: skip
                if of_code:
                    axis.plot([], [], color=colour, marker=_MARKERS[code], ms=4.5, label=code)
            axis.set_xscale("log", base=2)
            axis.set_xticks(ks, [str(k) for k in ks])
            axis.minorticks_off()
            if axis.get_ylim()[0] > 0:
                axis.set_ylim(bottom=0)
            axis.set_xlabel("k, latents selected per token")
            axis.set_ylabel(label)
            axis.set_title(panel)
            axis.legend()
        return _svg(figure, f"{label} against k")


def firing_histograms(coders: list[CoderRow]) -> Markup:
    """Histograms of log10 firing rates, one panel per k, the codes over each other."""
    grouped: dict[str, list[CoderRow]] = {}
    for coder in coders:
        grouped.setdefault(f"{coder.panel}, k = {coder.k}", []).append(coder)
    many = len({c.panel for c in coders}) > 1
    # From the rate of a single firing on.
    lowest = float(np.floor(-np.log10(max(c.figures["rows"] for c in coders)) * 2) / 2)
    with _figure("firing-histograms", len(grouped), 2.3) as (figure, axes):
        for axis, (title, members) in zip(axes, grouped.items(), strict=True):
            for code, colour in COLOURS.items():
                counts = [
                    c.figures["log10_rate_histogram"]["counts"] for c in members if c.code == code
                ]
                if counts:
                    edges = members[0].figures["log10_rate_histogram"]["edges"]
                    mean = np.mean(counts, axis=0)
                    axis.stairs(mean, edges, color=colour, lw=1.4, label=code)
                    axis.stairs(mean, edges, color=colour, alpha=0.18, fill=True)
            axis.axvline(-1, color=_INK, lw=0.8, ls=":", alpha=0.6)
            axis.set_xticks(range(-6, 1, 1), ["1e-6", "1e-5", "1e-4", "0.001", "0.01", "0.1", "1"])
            axis.set_xlim(lowest, 0)
            axis.set_yscale("symlog", linthresh=1)
            axis.set_yticks([0, 1, 10, 100, 1000], ["0", "1", "10", "100", "1000"])
            # Room for the legend, on a log scale; a coder may have no living latent.
            axis.set_ylim(0, 40 * max(1.0, axis.dataLim.ymax))
            axis.minorticks_off()
            axis.set_title(title if many else f"k = {members[0].k}")
            axis.set_xlabel("firing rate")
            axis.set_ylabel("latents")
            axis.legend(loc="upper left")
        return _svg(figure, "Histograms of firing rates")


def training_curves(coders: list[CoderRow]) -> Markup:
    """Training FVU against rows seen, one panel per hookpoint, site and width."""
    grouped = _panels(coders)
    with _figure("training-curves", len(grouped), 3.0) as (figure, axes):
        for axis, (panel, members) in zip(axes, grouped.items(), strict=True):
            ks = sorted({c.k for c in members})
            for coder in members:
                rank = ks.index(coder.k) / max(1, len(ks) - 1)
                axis.plot(
                    [m["rows"] for m in coder.metrics], [m["fvu"] for m in coder.metrics],
                    color=COLOURS[coder.code], lw=0.8 + rank, alpha=0.45 + 0.55 * rank,
                    label=coder.label if coder.seed == members[0].seed else None,
                )  # fmt: skip
            axis.set_yscale("log")
            for formatter in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
                formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
            axis.set_xlabel("training rows")
            axis.set_ylabel("FVU (training)")
            axis.set_title(panel)
            axis.legend(fontsize=7, ncols=2)
        return _svg(figure, "Training curves")

"""A plot as inline SVG that follows the colours of the page, and as files for a paper.

The same numbers give the same bytes: no dates, and ids that depend on the name of the plot alone.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bsc.files import write_atomically

__all__ = ["COLOURS", "INK", "MARKERS", "Drawing", "left_label", "one_legend", "panels"]

COLOURS = {"continuous": "#2f7fc1", "binary": "#d9622b", "hybrid": "#7d55b3"}
"""Apart for every kind of colour vision, and on light and dark ground."""
MARKERS = {"continuous": "o", "binary": "s", "hybrid": "^"}
INK = "#010203"
"""Replaced by currentColor, so that text and axes take the colour of the page."""
_STYLE: Any = {
    "svg.fonttype": "none",
    "pdf.fonttype": 42,
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.grid": True,
    "grid.color": INK,
    "grid.alpha": 0.12,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    **dict.fromkeys(
        ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK
    ),
}


@dataclass(frozen=True)
class Drawing:
    """One figure of the report."""

    name: str
    """Name of its files."""
    alt: str
    """What it shows, in words with the numbers in them, for who cannot see it."""
    figure: Figure

    @property
    def wide(self) -> bool:
        """Whether it has panels beside each other, which need the whole width of a page."""
        return float(self.figure.get_size_inches()[0]) > 6

    def _saved(self, form: str, metadata: dict[str, Any]) -> bytes:
        buffer = io.BytesIO()
        with mpl.rc_context(_STYLE | {"svg.hashsalt": self.name}), warnings.catch_warnings():
            # Whoever shows it has the letters that the font of the plots has not.
            warnings.filterwarnings("ignore", message="Glyph .* missing")
            self.figure.savefig(buffer, format=form, transparent=True, metadata=metadata)
        return buffer.getvalue()

    def svg(self) -> Markup:
        """As an inline SVG element with a text alternative."""
        svg = self._saved("svg", {"Date": None, "Creator": None}).decode()
        svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
        svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
        # Ids that nothing refers to would be there twice in a page of several plots.
        used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', svg))
        svg = re.sub(r' id="([^"]*)"', lambda m: m[0] if m[1] in used else "", svg)
        svg = re.sub(r"font: ([^;\"]*?)'?sans-serif'?", r"font: \1inherit", svg)
        alt = str(Markup.escape(self.alt))
        return Markup(svg.replace(">", f' role="img" aria-label="{alt}">', 1))

    def save(self, folder: Path) -> list[Path]:
        """Write NAME.svg and NAME.pdf."""
        forms = {
            "svg": {"Date": None, "Creator": None},
            "pdf": {"CreationDate": None, "Creator": None, "Producer": None},
        }
        paths = []
        for form, metadata in forms.items():
            paths.append(folder / f"{self.name}.{form}")
            write_atomically(paths[-1], self._saved(form, metadata))
        return paths


@contextmanager
def panels(
    count: int, height: float = 2.7, columns: int | None = None, *, share: bool = True
) -> Iterator[tuple[Figure, list[Axes]]]:
    """A figure of panels, as wide as the page where there are several.

    Args:
        count: panels.
        height: of a row of them, in inches.
        columns: panels in a row; None: up to four, evenly.
        share: whether they share the y axis.
    """
    rows = -(-count // 4) if columns is None else -(-count // columns)
    columns = columns or -(-count // rows)
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(11 if columns > 1 else 5.2, height * rows), layout="constrained")
        engine: Any = figure.get_layout_engine()
        engine.set(w_pad=0.08)  # the last number of an axis is not the first of the next one
        axes: list[Axes] = []
        for i in range(count):
            first = axes[0] if axes and share else None
            axes.append(figure.add_subplot(rows, columns, i + 1, sharey=first))
            if share and i % columns:
                axes[-1].tick_params(labelleft=False)
        yield figure, axes


def one_legend(figure: Figure, axes: Sequence[Axes], columns: int = 6) -> None:
    """One legend below all panels, of what any of them shows."""
    found: dict[str, Any] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    if found:
        figure.legend(
            found.values(),
            found,
            loc="outside lower center",
            ncols=min(columns, len(found)),
            fontsize=8,
        )


def left_label(axes: Sequence[Axes], text: str) -> None:
    """The label of a shared y axis, where its numbers are."""
    for axis in axes:
        if axis.yaxis.get_tick_params()["labelleft"]:
            axis.set_ylabel(text)

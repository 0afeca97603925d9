"""A plot as inline SVG that follows the colours of the page, and as files for a paper.

The same numbers give the same bytes: no dates, and ids that depend on the name of the plot alone.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bsc.files import write_atomically

__all__ = ["COLOURS", "INK", "MARKERS", "Drawing", "panels"]

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
    """Of its files."""
    alt: str
    """What it shows, in words with the numbers in them, for who cannot see it."""
    figure: Figure

    def _saved(self, form: str, metadata: dict[str, Any]) -> bytes:
        buffer = io.BytesIO()
        with mpl.rc_context(_STYLE | {"svg.hashsalt": self.name}):
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
        forms = {"svg": {"Date": None, "Creator": None},
                 "pdf": {"CreationDate": None, "Creator": None, "Producer": None}}  # fmt: skip
        paths = []
        for form, metadata in forms.items():
            paths.append(folder / f"{self.name}.{form}")
            write_atomically(paths[-1], self._saved(form, metadata))
        return paths


@contextmanager
def panels(count: int, height: float = 2.7) -> Iterator[tuple[Figure, list[Axes]]]:
    """A figure with up to three panels in a row; four make two rows."""
    columns = 2 if count == 4 else min(3, count)
    rows = -(-count // columns)
    with mpl.rc_context(_STYLE):
        width = 3.6 * columns if columns > 1 else 5.2
        figure = Figure(figsize=(width, height * rows), layout="constrained")
        yield figure, [figure.add_subplot(rows, columns, i + 1) for i in range(count)]

"""Contexts in which a latent fires, as HTML that is read without a script.

A context shows some tokens around a firing; the rest of it is there too and is shown when its
number is pressed. Tokens that fire are marked, and those on which a partner fires are underlined.
"""

from __future__ import annotations

import html
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from bsc.eval.figures.split_text import SplitText
from bsc.eval.report.links import shade
from bsc.formats import printable

__all__ = ["Marks", "context", "plain"]

BEFORE, AFTER = 60, 40
"""Tokens around a firing that an opened context shows."""
_EVEN = 6
"""Strength of every mark of a binary latent."""


class Marks(NamedTuple):
    """The firings of a latent, as they are marked."""

    row: NDArray[Any]
    """Ascending."""
    margin: NDArray[np.float32]
    graded: bool
    """Whether a mark says how strong the firing was: a binary latent is on or off."""
    largest: float = 1.0
    """The margin of the strongest mark."""

    def between(self, low: int, high: int) -> Iterator[tuple[int, float]]:
        """Row and margin of the firings from row `low` to row `high`, exclusive."""
        here = slice(*self.row.searchsorted((low, high)).tolist())
        yield from zip(self.row[here].tolist(), self.margin[here].tolist(), strict=True)

    def strength(self, margin: float) -> int:
        """1 to 9."""
        return shade(margin, self.largest) if self.graded else _EVEN


def context(
    text: SplitText, row: int, label: str, marks: Marks, partner: Marks | None = None
) -> Markup:
    """One context.

    Args:
        text: of the held-out rows.
        row: of the firing in the middle.
        label: what the context is called: the tenth of the firings that it is of.
        marks: firings of the latent.
        partner: those of another one, underlined.
    """
    low, high = text.around(row)
    first, last = text.around(row, BEFORE, AFTER)
    strings = text.each(first, last)
    strength = {r: (f"s{marks.strength(m)}", f"{m:.4g}") for r, m in marks.between(first, last)}
    under = {r for r, _ in partner.between(first, last)} if partner else set()

    marked = sorted(strength.keys() | under)

    def piece(start: int, end: int) -> str:
        parts, at = [], start
        for r in marked:
            if not start <= r < end:
                continue
            parts.append(_escaped("".join(strings[at - first : r - first])))
            token = (
                _escaped(strings[r - first]) or "\u2009"
            )  # of a character that is completed later
            if r in under:
                token = f"<u>{token}</u>"
            if r in strength:
                kind, value = strength[r]
                drawn = " drawn" if r == row else ""
                token = f'<mark class="{kind}{drawn}" title="{value}">{token}</mark>'
            parts.append(token)
            at = r + 1
        parts.append(_escaped("".join(strings[at - first : end - first])))
        return "".join(parts)

    before, after = piece(first, low), piece(high, last)
    more = f'<input type="checkbox" aria-label="more of this text">{_escaped(label)}'
    return Markup(
        f'<div class="context"><label class="stratum">{more}</label>'
        + (f'<span class="more">{before}</span>' if before else "")
        + piece(low, high)
        + (f'<span class="more">{after}</span>' if after else "")
        + "</div>"
    )


def _escaped(text: str) -> str:
    """Foreign text for a page: no character of it is markup, acts or is invisible."""
    return html.escape(printable(text, lines=True))


def plain(text: SplitText, row: int) -> str:
    """The words of a context, on one line, for a search."""
    return " ".join(printable("".join(text.each(*text.around(row))), lines=True).split())

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

__all__ = ["ContextPages", "Marks"]

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


class ContextPages:
    """Contexts of a split as HTML. A text is made safe for a page once, token by token."""

    def __init__(self, text: SplitText) -> None:
        """For the text of the held-out rows."""
        self.text = text
        self._safe: dict[int, list[str]] = {}
        self._shown: dict[str, str] = {}

    def prepare(self) -> None:
        """Make all texts safe, before processes are made that share what is there."""
        for text in range(len(self.text.starts)):
            self._tokens_of(text)

    def html(self, row: int, label: str, marks: Marks, partner: Marks | None = None) -> Markup:
        """One context.

        Args:
            row: of the firing in the middle.
            label: what the context is called: the tenth of the firings that it is of.
            marks: firings of the latent.
            partner: those of another one, with a line of dots under them.
        """
        low, high = self.text.around(row)
        first, last = self.text.around(row, BEFORE, AFTER)
        tokens = self._tokens(row, first, last)
        marked = {
            r: _mark(tokens[r - first], marks, m, drawn=r == row and partner is None)
            for r, m in marks.between(first, last)
        }
        for r, _ in partner.between(first, last) if partner else ():
            marked[r] = f"<u>{marked.get(r, tokens[r - first])}</u>"
        for r, token in marked.items():
            tokens[r - first] = token
        low, high = low - first, high - first
        before, here, after = tokens[:low], tokens[low:high], tokens[high:]
        return Markup(
            f'<div class="context"><label class="stratum"><input type="checkbox" '
            f'aria-label="more of this text">{label}</label>'
            f"{_more(before)}{''.join(here)}{_more(after)}</div>"
        )

    def words(self, row: int) -> str:
        """The words of a context, on one line, for a search."""
        text = "".join(self.text.each(*self.text.around(row)))
        return " ".join(printable(text, lines=True).split())

    def _tokens(self, row: int, first: int, last: int) -> list[str]:
        """Tokens of a text, of which no character is markup, acts or is invisible."""
        text = self.text.text_of(row)
        start = int(self.text.starts[text])
        return self._tokens_of(text)[first - start : last - start]

    def _tokens_of(self, text: int) -> list[str]:
        if text not in self._safe:
            strings = self.text.each(int(self.text.starts[text]), int(self.text.ends[text]))
            for new in set(strings) - self._shown.keys():
                self._shown[new] = html.escape(printable(new, lines=True))
            self._safe[text] = [self._shown[s] for s in strings]
        return self._safe[text]


def _mark(token: str, marks: Marks, margin: float, *, drawn: bool) -> str:
    # A token whose character is completed by a later one has no text of its own.
    kind = f"s{marks.strength(margin)}{' drawn' if drawn else ''}"
    return f'<mark class="{kind}" title="{margin:.4g}">{token or "&thinsp;"}</mark>'


def _more(tokens: list[str]) -> str:
    return f'<span class="more">{"".join(tokens)}</span>' if tokens else ""

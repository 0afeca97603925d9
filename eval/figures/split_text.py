"""The text of a split token by token, and around its rows.

Text is decoded a whole text at a time: one by one some tokenizers lose spaces, and a character of
several tokens is none of them. It belongs to the token that completes it.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bsc.cache.store.split import StoreSplit
from bsc.eval.figures.division import divide
from bsc.eval.passes.batches import text_starts

__all__ = ["SplitText", "token_strings"]

BEFORE, AFTER = 20, 10
"""Tokens around a firing that are shown."""
_UNFINISHED = "\ufffd"
_LONGEST = 16
"""Tokens that one character takes at most; bytes that never become one are shown as they are."""


class SplitText:
    """The text around rows of a split."""

    def __init__(self, split: StoreSplit, tokenizer: Any) -> None:
        """Read the token side of the split: 21 bytes a row."""
        self.ids = split.tokens("token_id")
        self.doc_id = split.tokens("doc_id")
        position = split.tokens("position").astype(np.int64)
        self.starts = text_starts(self.doc_id, position)
        self.ends = np.append(self.starts[1:], len(position))
        self.position = position
        self.tokenizer = tokenizer
        self.part = divide(self.doc_id, split.tokens("ngram"))
        """What each row is for (figures/division.py)."""
        self._alone: dict[int, str] = {}
        self._strings: dict[int, list[str]] = {}

    def around(self, row: int, before: int = BEFORE, after: int = AFTER) -> tuple[int, int]:
        """First row and row after the last one that are shown around a row."""
        text = self.text_of(row)
        low, high = max(int(self.starts[text]), row - before), row + after + 1
        return low, min(int(self.ends[text]), high)

    def marked(
        self, row: int, firing: NDArray[Any], margin: NDArray[np.float32]
    ) -> list[list[Any]]:
        """The text around a row as [text, margin, drawn] pieces: one for each firing token, and
        one for each run of silent tokens, whose margin is None; drawn says whether it is the row.

        Args:
            row: in the middle.
            firing: rows where the latent fires, ascending.
            margin: of each.
        """
        low, high = self.around(row)
        here = slice(*np.searchsorted(firing, [low, high]))
        marks = {
            int(r): round(float(m), 4) for r, m in zip(firing[here], margin[here], strict=True)
        }
        borders = sorted({low, *(b for r in marks for b in (r, r + 1))} - {high})
        strings = self.each(low, high)
        return [
            ["".join(strings[start - low : end - low]), marks.get(start), start == row]
            for start, end in zip(borders, [*borders[1:], high], strict=True)
        ]

    def runs(self, start: int, tokens: int, marks: Collection[int]) -> list[tuple[str, bool]]:
        """Text of `tokens` tokens from row `start` on, as (text, whether it is marked) runs.

        Marked tokens that follow each other are one run.

        Args:
            start: first row.
            tokens: how many.
            marks: marked tokens, counted from the first one.
        """
        flags = [i in marks for i in range(tokens)]
        borders = [0, *(i for i in range(1, tokens) if flags[i] != flags[i - 1])]
        strings = self.each(start, start + tokens)
        return [
            ("".join(strings[first:end]), flags[first])
            for first, end in zip(borders, [*borders[1:], tokens], strict=True)
        ]

    def each(self, low: int, high: int) -> list[str]:
        """Text of every token from row `low` to row `high`, exclusive."""
        found: list[str] = []
        while low < high:
            text = self.text_of(low)
            first, end = int(self.starts[text]), min(high, int(self.ends[text]))
            if text not in self._strings:
                ids = self.ids[first : int(self.ends[text])].tolist()
                self._strings[text] = token_strings(self.tokenizer, ids, self._alone)
            found += self._strings[text][low - first : end - first]
            low = end
        return found

    def token(self, token: int) -> str:
        """What a token is on its own."""
        if token not in self._alone:
            self._alone[token] = _decoded(self.tokenizer, [token])
        return self._alone[token]

    def text_of(self, row: int) -> int:
        """Number of the text that a row is in."""
        return int(self.starts.searchsorted(row, side="right")) - 1


def token_strings(
    tokenizer: Any, ids: Sequence[int], alone: dict[int, str] | None = None
) -> list[str]:
    """What each token adds to the text, (n,) strings whose concatenation is the text.

    Args:
        tokenizer: of transformers.
        ids: (n,) tokens of one text.
        alone: what tokens are on their own, as far as it is known; more is put in.
    """
    alone = {} if alone is None else alone
    for token in set(ids) - alone.keys():
        alone[token] = _decoded(tokenizer, [token])
    found = [alone[token] for token in ids]
    if "".join(found) == _decoded(tokenizer, ids):
        return found
    # Token by token, each with what came before it since the last whole character but one.
    found, before, read = [], 0, 0
    for end in range(1, len(ids) + 1):
        known = _decoded(tokenizer, ids[before:read])
        text = _decoded(tokenizer, ids[before:end])
        if end < len(ids) and text.endswith(_UNFINISHED) and end - read < _LONGEST:
            found.append("")
            continue
        found.append(text[len(known) :])
        before, read = read, end
    return found


def _decoded(tokenizer: Any, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))

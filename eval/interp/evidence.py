"""The excerpts of text that a latent is explained from and tested on.

An excerpt is a run of tokens of one text. Those that the explanation is written from, those of the
tests in which the latent fires and those in which it does not come from different documents: half
of all documents, by a hash of their number, are to explain from (division.py), and each other
one is, by a hash of its number and the latent's, for excerpts with or for excerpts without firings.

Every excerpt without firings is made for one with firings: it is as long, its marked tokens are in
the same places, and it begins or ends its text where the other does, so that nothing but words can
tell which is which. Where the excerpt begins is drawn at random, so the firing that it was drawn
for is anywhere in it.

Latents that fire so often that excerpts without a firing hardly exist get one marked token in each
excerpt instead: a firing one, or, in excerpts of the other documents in which the latent fires too,
a silent one in the same place.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from bsc.eval.figures.division import EXPLAIN, NEITHER, TEST
from bsc.eval.figures.examples import STRATA
from bsc.eval.figures.split_text import SplitText
from bsc.eval.interp.config import Marking
from bsc.hashing import hash64

__all__ = ["MIN_EXCERPTS", "Evidence", "Texts", "Excerpt", "gather"]

MIN_EXCERPTS = 5
"""With fewer excerpts of a kind a latent is unscorable."""
_TRIES = 4_096
"""Places that are looked at for excerpts without firings, drawn uniformly."""

"""Which firing tokens are marked: all, or those of at least 0.3 of the largest value in the excerpt
(binary firings are all equal, so all of them)."""
STRONG = 0.3


class Excerpt(NamedTuple):
    """A run of tokens."""

    start: int
    """Its first row in the split."""
    tokens: int
    marks: tuple[int, ...]
    """Marked tokens, counted from the first one of the excerpt."""
    stratum: int = -1
    """Tenth of the latent's firings that the excerpt was drawn for, 9 the strongest; -1: none."""


@dataclass(frozen=True)
class Evidence:
    """Excerpts of one latent."""

    latent: int
    firings: int
    explain: list[Excerpt] = field(default_factory=list)
    firing: list[Excerpt] = field(default_factory=list)
    """To test with: the latent fires in them, and firing tokens are marked."""
    silent: list[Excerpt] = field(default_factory=list)
    """It fires on no token of them; the marks are those of `firing`, one by one."""
    firing_token: list[Excerpt] = field(default_factory=list)
    """One firing token is marked, where `silent` could not be filled."""
    silent_token: list[Excerpt] = field(default_factory=list)
    """One silent token is marked, in the same place, of an excerpt in which it fires elsewhere."""

    drawn: int = 0
    """Excerpts with firings that there were, before others were looked for."""

    @property
    def why_not(self) -> str | None:
        """Why it cannot be explained and tested at all; None: it can."""
        if len(self.explain) < MIN_EXCERPTS:
            return "too few excerpts to explain from"
        if self.drawn < MIN_EXCERPTS:
            return "too few excerpts to test on"
        return None


class Texts:
    """Where excerpts can be: texts of a split, and what is known of each row."""

    def __init__(
        self, split_text: SplitText, read: NDArray[np.bool_], *, length: int, seed: int
    ) -> None:
        """Take the text and what its rows are for.

        Args:
            split_text: text of the split.
            read: (rows,) whether a row was evaluated: of the others no firing is known.
            length: tokens of an excerpt at most.
            seed: of the draws.
        """
        self.split_text, self.read, self.length, self.seed = split_text, read, length, seed
        self.doc_id = split_text.doc_id.astype(np.uint64)
        self.explain, self.test = split_text.part == EXPLAIN, split_text.part == TEST
        # Texts end where rows were not evaluated any more: `bsc eval --rows`.
        last = int(np.flatnonzero(read)[-1]) + 1 if read.any() else 0
        # An excerpt does not reach into text that stands on both sides: it ends there like a text.
        neither = np.flatnonzero(np.diff(split_text.part == NEITHER, prepend=False))
        starts = np.union1d(split_text.starts, neither)
        sizes = np.diff(np.append(starts, len(read)))
        self.text_start = np.repeat(starts, sizes)
        self.text_end = np.minimum(np.repeat(starts + sizes, sizes), max(last, 1))
        self.rows = np.flatnonzero(read & self.test)
        """To look for excerpts without firings from."""

    def for_firing(self, rows: NDArray[np.int64], latent: int) -> NDArray[np.bool_]:
        """Whether the document of a row, one of those to test on, is for excerpts with firings."""
        key = self.doc_id[rows] ^ np.uint64(latent) << np.uint64(40)
        return np.asarray(hash64(key, self.seed + 1) >> np.uint64(63) == 0)


def gather(
    texts: Texts,
    latent: int,
    row: NDArray[np.int64],
    value: NDArray[np.float32],
    *,
    explain: int,
    test: int,
    marking: Marking = "all",
    graded: bool = False,
    negatives: Literal["auto", "silent", "active"] = "auto",
) -> Evidence:
    """Excerpts of one latent.

    Args:
        texts: of the split.
        latent: its number.
        row: rows where it fires, ascending.
        value: margin of each firing.
        explain: excerpts to explain from at most.
        test: excerpts with firings, and as many without, to test on at most.
        marking: which firing tokens are marked.
        graded: whether the margins are values, so that there are weak ones to leave unmarked.
        negatives: excerpts without firings, silent tokens of excerpts with firings, or the latter
            where the former hardly exist.
    """
    row = row.astype(np.int64)
    n = len(row)
    priority = hash64(row.astype(np.uint64) << np.uint64(24) ^ np.uint64(latent), texts.seed + 2)
    order = np.lexsort((priority, value))
    stratum = np.empty(n, np.int64)
    stratum[order] = np.arange(n) * STRATA // max(1, n)
    explaining = texts.explain[row]
    firing_document = texts.for_firing(row, latent)

    def drawn(which: NDArray[np.bool_], limit: int) -> list[tuple[int, Excerpt]]:
        return _drawn(
            texts, row, value, stratum, priority, which, limit, marking if graded else "all"
        )

    excerpts = [w for _, w in drawn(explaining, explain)]
    around = drawn(texts.test[row] & firing_document, test)
    evidence = Evidence(latent, n, excerpts, [w for _, w in around], drawn=len(around))
    if evidence.why_not or len(texts.rows) == 0:
        return evidence
    rng = np.random.Generator(np.random.Philox(key=[texts.seed, latent]))
    rows = texts.rows[rng.integers(len(texts.rows), size=2 * _TRIES)]
    places = _Places(texts, row, rows[~texts.for_firing(rows, latent)])
    firing, silent = _silent(places, evidence.firing)
    # One for each, so that lengths, edges and marks are the same on both sides.
    rest = len(silent) < max(MIN_EXCERPTS, len(around) // 2)
    evidence.firing[:], evidence.silent[:] = firing, silent
    if negatives == "active" or (negatives == "auto" and rest):
        tokens = [w._replace(marks=(r - w.start,)) for r, w in around]
        firing, silent = _silent_tokens(places, tokens)
        if len(silent) >= MIN_EXCERPTS:
            evidence.firing_token[:], evidence.silent_token[:] = firing, silent
    return evidence


def _drawn(
    texts: Texts,
    row: NDArray[np.int64],
    value: NDArray[np.float32],
    stratum: NDArray[np.int64],
    priority: NDArray[np.uint64],
    which: NDArray[np.bool_],
    limit: int,
    marking: Marking,
) -> list[tuple[int, Excerpt]]:
    """Excerpts around firings, as many of each stratum as can be, none overlapping another."""
    chosen = np.flatnonzero(which)
    # The first of every stratum, then the second of every one, and so on.
    chosen = chosen[np.lexsort((priority[chosen], stratum[chosen]))]
    starts = np.searchsorted(stratum[chosen], stratum[chosen], side="left")
    turn = np.arange(len(chosen)) - starts
    chosen = chosen[np.lexsort((priority[chosen], turn))]
    found: list[tuple[int, Excerpt]] = []
    taken: list[tuple[int, int]] = []
    for i in chosen[: 20 * limit]:
        if len(found) == limit:
            break
        r = int(row[i])
        low, high = int(texts.text_start[r]), int(texts.text_end[r])
        tokens = min(texts.length, high - low)
        # Not the bits that the priority was sorted by.
        start = min(max(low, r - int(priority[i] & np.uint64(0xFFFF)) % tokens), high - tokens)
        if any(start < b and a < start + tokens for a, b in taken):
            continue
        here = slice(*np.searchsorted(row, [start, start + tokens]))
        marks = row[here] - start
        if marking == "strong":
            marks = marks[value[here] >= STRONG * value[here].max()]
        taken.append((start, start + tokens))
        excerpt = Excerpt(start, tokens, tuple(int(m) for m in marks), int(stratum[i]))
        found.append((r, excerpt))
    return found


class _Places:
    """Where excerpts like another one can be: as long, and at an edge of their text where it is.

    Edges can be seen, and would tell excerpts around firings, which are moved inside of their text
    where they would stick out, from any others.
    """

    def __init__(self, texts: Texts, row: NDArray[np.int64], rows: NDArray[np.int64]) -> None:
        """Look around some rows, in the order in which they are to be tried; `row` are those where
        the latent fires, ascending."""
        self.texts, self.row, self.rows = texts, row, rows
        self._known: dict[tuple[int, bool, bool], tuple[NDArray[Any], ...]] = {}

    def like(
        self, excerpt: Excerpt
    ) -> tuple[NDArray[np.int64], NDArray[np.bool_], NDArray[np.bool_]]:
        """The start of an excerpt for each row, whether it is like the other, and whether the
        latent is silent in all of it."""
        texts = self.texts
        first = excerpt.start == int(texts.text_start[excerpt.start])
        last = excerpt.start + excerpt.tokens == int(texts.text_end[excerpt.start])
        key = (excerpt.tokens, first, last)
        if key not in self._known:
            low, high = texts.text_start[self.rows], texts.text_end[self.rows]
            starts = low if first else high - excerpt.tokens if last else self.rows
            ends = starts + excerpt.tokens
            like = (starts >= low) & (ends <= high)
            like &= ((starts == low) == first) & ((ends == high) == last)
            self._known[key] = starts, like, self.silent(starts, ends)
        starts, like, silent = self._known[key]
        return starts, like, silent

    def silent(self, starts: NDArray[np.int64], ends: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Whether the latent fires nowhere from a start to an end."""
        return np.asarray(np.searchsorted(self.row, starts) == np.searchsorted(self.row, ends))


def _silent(places: _Places, firing: list[Excerpt]) -> tuple[list[Excerpt], list[Excerpt]]:
    """For each excerpt one without a firing, as long and with its marks; both, in pairs."""
    kept: list[Excerpt] = []
    found: list[Excerpt] = []
    used: list[tuple[int, int]] = []
    for excerpt in firing:
        starts, like, silent = places.like(excerpt)
        fits = like & silent
        if like.sum() >= MIN_EXCERPTS and not fits.any():
            # The latent fires wherever an excerpt touches that edge: it is what it is about.
            starts = places.rows
            ends = starts + excerpt.tokens
            fits = (ends <= places.texts.text_end[starts]) & places.silent(starts, ends)
        for a, b in used:
            fits &= (starts + excerpt.tokens <= a) | (starts >= b)
        if fits.any():
            start = int(starts[np.argmax(fits)])
            used.append((start, start + excerpt.tokens))
            kept.append(excerpt)
            found.append(excerpt._replace(start=start, stratum=-1))
    return kept, found


def _silent_tokens(places: _Places, firing: list[Excerpt]) -> tuple[list[Excerpt], list[Excerpt]]:
    """For each excerpt with one marked token another with a silent token in the same place, in
    which the latent fires on others; both, in pairs."""
    kept: list[Excerpt] = []
    found: list[Excerpt] = []
    row, used = places.row, set()
    free = np.ones(len(places.rows), bool)
    for excerpt in firing:
        starts, like, silent = places.like(excerpt)
        token = np.where(like, starts + excerpt.marks[0], 0)
        here = np.minimum(np.searchsorted(row, token), len(row) - 1)
        quiet = (row[here] != token) & places.texts.read[token]
        for i in np.flatnonzero(like & quiet & ~silent & free):
            # Excerpts of frequent latents may overlap; the marked token is another one.
            if int(token[i]) not in used:
                used.add(int(token[i]))
                free[i] = False
                kept.append(excerpt)
                found.append(excerpt._replace(start=int(starts[i]), stratum=-1))
                break
    return kept, found

"""The pages of a coder's latents: what is on each, and its HTML."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import jinja2
import numpy as np
from markupsafe import Markup, escape
from numpy.typing import NDArray

from bsc.eval.browse.contexts import ContextPages, Marks
from bsc.eval.browse.drawing import bars
from bsc.eval.browse.firings import FiringFacts, firing_facts, position_edges
from bsc.eval.browse.logits import Effects, Unembedding
from bsc.eval.browse.neighbours import NONE, Near, Partners, by_decoder, by_firing, partners
from bsc.eval.browse.subject import BrowsedCoder, Subject
from bsc.eval.figures.examples import STRATA
from bsc.eval.passes.codes import LatentCode
from bsc.eval.report.links import latent_page
from bsc.formats import percent, printable

__all__ = ["POLICY", "CoderPages", "Shown", "visible"]

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; frame-src 'self'; "
    "base-uri 'none'; form-action 'none'"
)
"""Of every page: scripts and styles of its own folder, and no request to anywhere."""
_SPACES = re.compile(" +")
_BESIDE = 2
"""Contexts of a partner where both fire, where this one alone does, and where that one does."""
_SEARCHED = 2
"""Contexts of a latent whose words a search finds, the strongest ones."""


def visible(token: str) -> str:
    """A token with its spaces and line ends seen.

    >>> visible(" the\\n"), visible("\\n       ")
    ('␣the↵', '↵␣×7')
    """
    shown = token.replace("\n", "\u21b5").replace("\t", "\u21e5")
    return printable(_SPACES.sub(_counted, shown))


def _counted(spaces: re.Match[str]) -> str:
    n = len(spaces[0])
    return "\u2423" * n if n < 3 else f"\u2423\u00d7{n}"


class Shown(NamedTuple):
    """A latent's page, and the words in it that are sought by a search."""

    latent: int
    html: str
    words: str


class _Partner:
    """The latents of another coder, matched to those of this one."""

    def __init__(self, subject: Subject, own: BrowsedCoder, other: BrowsedCoder) -> None:
        self.coder = other
        self.a, self.b = subject.code(own), subject.code(other)
        W_a, W_b = own.read_decoder(), other.read_decoder()
        self.forth: Partners = partners(W_a, W_b, self.a, self.b)

    def of(self, latent: int, contexts: Any, link: Any) -> dict[str, Any] | None:
        """What a page says of a latent's partner."""
        partner = int(self.forth.latent[latent])
        if partner == NONE:
            return None
        rows, _ = self.a.of(latent)
        others, _ = self.b.of(partner)
        here = slice(int(self.a.offsets[latent]), int(self.a.offsets[latent + 1]))
        together = self.forth.together[here]
        groups = (
            ("Both fire", rows[together]),
            ("This one alone", rows[~together]),
            ("That one alone", np.setdiff1d(others, rows, assume_unique=True)),
        )
        return {
            "latent": partner, "title": self.coder.title, "link": link(self.coder, partner),
            "cosine": float(self.forth.cosine[latent]), "mutual": bool(self.forth.mutual[latent]),
            "both": int(self.forth.both[latent]), "firings": len(others),
            "jaccard": float(self.forth.jaccard[latent]),
            "contexts": [(name, contexts(_spread(which), others)) for name, which in groups],
        }  # fmt: skip


def _spread(rows: NDArray[Any]) -> list[int]:
    """A few of some rows, in the middle of equal parts of them, so of different documents."""
    n = min(_BESIDE, len(rows))
    return [int(rows[(2 * i + 1) * len(rows) // (2 * n)]) for i in range(n)]


class CoderPages:
    """Everything that is shown of one coder."""

    def __init__(
        self,
        subject: Subject,
        coder: BrowsedCoder,
        environment: jinja2.Environment,
        unembedding: Unembedding | None,
        *,
        latents: int | None,
        contexts: int,
    ) -> None:
        """Read the code, and find what can be found of all latents at once."""
        self.subject, self.browsed, self.contexts = subject, coder, contexts
        self.latents = coder.shown(latents)
        self.code: LatentCode = subject.code(coder)
        self.text, read = coder.of.text, coder.of.read(coder.planned.hookpoint)
        self.html: ContextPages = coder.of.contexts
        self.rows = int(read.sum())
        edges = position_edges(int(self.text.position.max()) + 1)
        position = np.searchsorted(edges, self.text.position, side="right") - 1
        self.at_position = np.bincount(position[read], minlength=len(edges) - 1)
        self.last_position = int(edges[-1]) - 1
        self.tokens_read = np.bincount(self.text.ids[read])
        self.facts: FiringFacts = firing_facts(
            self.code, self.text.ids, position, len(edges) - 1
        )  # fmt: skip
        W_dec = coder.read_decoder()
        self.records, self.sample = coder.read_records(), coder.read_sample()
        self.near_decoder: Near = by_decoder(W_dec, coder.counts > 0)
        self.near_firing: Near = by_firing(self.code, len(read))
        fits = unembedding is not None and unembedding.weight.shape[1] == W_dec.shape[1]
        self.effects: Effects | None = unembedding.largest(W_dec) if unembedding and fits else None
        self.partners = [_Partner(subject, coder, other) for other in subject.partners(coder)]
        self._template = environment.get_template("latent.html.j2")
        self._shown = {one.slug: set(one.shown(latents)) for one in subject.coders}
        self._place = {latent: i for i, latent in enumerate(self.latents)}

    def page(self, latent: int) -> Shown:
        """The page of a latent."""
        rows, margins = self.code.of(latent)
        drawn = self.sample.of(latent)
        chosen = [
            (int(stratum), int(drawn.row[i]), float(drawn.margin[i]))
            for stratum in sorted(set(drawn.stratum.tolist()), reverse=True)
            for i in np.flatnonzero(drawn.stratum == stratum)[: self.contexts]
        ]
        valued = latent < self.browsed.first_binary
        largest = max((margin for *_, margin in chosen), default=1.0)
        marks = Marks(rows, margins, valued, largest)
        words = " ".join(self.html.words(row) for _, row, _ in chosen[:_SEARCHED])
        record = self.records[latent]
        facts, at = self.facts, self._place[latent]
        values = {
            "latent": latent,
            "before": self.latents[at - 1] if at else None,
            "after": self.latents[at + 1] if at + 1 < len(self.latents) else None,
            "kind": "valued" if valued else "binary",
            "valued": valued,
            "rate": record.rate,
            "firings": record.firings,
            "rows": self.rows,
            "mean_margin": facts.mean_margin[latent],
            "explanations": {printable(j): printable(e) for j, e in record.explanations.items()},
            "scores": {printable(name): score for name, score in record.scores.items()},
            "diagnosis": record.diagnosis,
            "contexts": [
                self.html.html(row, str(stratum + 1), marks) for stratum, row, _ in chosen
            ],
            "partners": [
                found
                for i, partner in enumerate(self.partners)
                if (found := partner.of(latent, self._beside(marks, shown=i == 0), self._link))
            ],
            "near": self._near(latent),
            "promoted": self._promoted(latent),
        }
        if record.firings:
            values |= self._plots(latent)
        page = self._template.render(page=values, coder=self.browsed, policy=POLICY)
        return Shown(latent, page, words)

    def _beside(self, marks: Marks, *, shown: bool) -> Any:
        """Writes contexts of a partner; of the first one alone, so that pages stay small."""

        def write(rows: list[int], others: NDArray[Any]) -> list[Markup]:
            under = Marks(others, np.zeros(len(others), np.float32), False)
            return [self.html.html(row, "more", marks, under) for row in rows] if shown else []

        return write

    def _link(self, coder: BrowsedCoder, latent: int) -> Markup:
        """The number of a latent, and where its page is if it has one."""
        if latent not in self._shown[coder.slug]:
            return Markup(str(latent))
        place = latent_page(latent)
        to = f"../{place}" if coder is self.browsed else f"../../{escape(coder.slug)}/{place}"
        return Markup(f'<a href="{to}">{latent}</a>')

    def _near(self, latent: int) -> list[tuple[Any, ...]]:
        pairs = []
        for near in (self.near_decoder, self.near_firing):
            found = zip(near.latent[latent].tolist(), near.likeness[latent].tolist(), strict=True)
            pairs.append(
                [(self._link(self.browsed, i) if i != NONE else None, x) for i, x in found]
            )
        return list(zip(*pairs, strict=True))

    def _promoted(self, latent: int) -> list[Any]:
        if self.effects is None:
            return []
        e = self.effects
        up, down = (
            [
                (visible(self.text.token(t)), x)
                for t, x in zip(ts.tolist(), xs.tolist(), strict=True)
            ]
            for ts, xs in (
                (e.promoted[latent], e.promotion[latent]),
                (e.suppressed[latent], e.suppression[latent]),
            )
        )
        return list(zip(up, down, strict=True))

    def tokens(self, latent: int) -> list[tuple[str, int, float]]:
        """Tokens on which a latent fires most often, its firings on each, and their share of it."""
        f = self.facts
        return [
            (visible(self.text.token(token)), n, n / int(self.tokens_read[token]))
            for token, n in zip(
                f.token[latent].tolist(), f.token_firings[latent].tolist(), strict=True
            )
            if n
        ]

    def _plots(self, latent: int) -> dict[str, Any]:
        f = self.facts
        borders, counts = f.borders[latent].tolist(), f.histogram[latent]
        span = (borders[STRATA] - borders[0]) or 1.0
        share = f.positions[latent] / np.maximum(1, self.at_position)
        words = ", ".join(percent(float(x), 1) for x in share)
        return {
            "histogram": bars(
                np.log1p(counts).tolist(),
                [(b - borders[0]) / span for b in borders[1:STRATA]],
                f"Firings from {borders[0]:.3g} to {borders[STRATA]:.3g} in {len(counts)} equal "
                f"steps: {', '.join(map(str, counts.tolist()))}.",
            ),
            "smallest": borders[0],
            "largest": borders[STRATA],
            "positions": bars(share.tolist(), (), f"Share by position: {words}."),
            "last_position": self.last_position,
            "tokens": self.tokens(latent),
        }

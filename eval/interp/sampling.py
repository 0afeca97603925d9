"""Which latents are scored, and the weight that each of them has in a mean.

Two means are estimated, over the latents of a coder that fire often enough to be scored: the
unweighted one, sum s / N, and the one weighted by firing rate, sum p s / sum p. Which share of the
living latents, and of all firings, the others are is counted and not estimated. Each mean has its
own sample. The unweighted one is drawn
uniformly. For the weighted one every latent above a rate is taken (a census), and the others are
drawn in proportion to their rate by sequential Poisson sampling (Ohlsson 1998, "Sequential Poisson
sampling", J. Official Statistics 14): the n latents with the smallest u / p, u uniform. A uniform
sample weighted by rate afterwards has about ten times the error.

Both designs use the same number u of each latent, a hash, so that their samples share latents as
far as they can, and two coders of one sweep, or one coder on another day, draw alike.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from bsc.formats import percent
from bsc.hashing import hash64

__all__ = ["DESIGNS", "Chosen", "Design", "choose"]

DESIGNS = ("unweighted", "weighted")


class Design(NamedTuple):
    """The sample of one mean."""

    latent: NDArray[np.int64]
    weight: NDArray[np.float64]
    """Weight of each latent's score in the estimate: what it stands for in the population."""
    census: NDArray[np.bool_]
    """Taken with certainty, so nothing would change about them in another sample."""
    population: int
    """Latents that were drawn from."""
    left_out: float
    """Share of the living latents, or of all firings, whose latents fire too rarely to be drawn."""


class Chosen(NamedTuple):
    """Samples of both means."""

    unweighted: Design
    weighted: Design

    def latents(self) -> list[int]:
        """All that are in either, ascending."""
        return sorted({int(i) for design in self for i in design.latent})

    def why_so_many(self, census_rate: float) -> str:
        """What their number is made of, in words."""
        alike, census = len(self.unweighted.latent), int(self.weighted.census.sum())
        drawn, total = len(self.weighted.latent) - census, len(self.latents())
        parts = [f"{alike} drawn evenly"]
        if drawn:
            parts.append(f"{drawn} drawn by their firings")
        if census:
            parts.append(
                f"all {census} that fire on more than {percent(census_rate)} of the rows "
                f"(--census-rate)"
            )
        twice = alike + drawn + census - total
        return f"{total} latents: {', '.join(parts)}" + (f"; {twice} are both" if twice else "")


def choose(
    counts: NDArray[np.int64], n: int, *, census: float, min_firings: int = 1, seed: int = 0
) -> Chosen:
    """Draw the latents to score.

    Args:
        counts: (F,) firings of each latent.
        n: latents in each sample at most, the census not counted.
        census: latents with at least so many firings are all in the weighted sample.
        min_firings: latents with fewer are not drawn.
        seed: of the draw.
    """
    living = np.flatnonzero(counts >= max(1, min_firings))
    rare = counts[(counts > 0) & (counts < min_firings)]
    u = (hash64(living, seed) >> np.uint64(11)).astype(np.float64) / 2**53
    u = np.maximum(u, 2.0**-60)

    order = np.argsort(u, kind="stable")[:n]
    drawn = np.sort(order)
    uniform = Design(
        living[drawn],
        np.full(len(drawn), len(living) / max(1, len(drawn))),
        np.full(len(drawn), len(drawn) == len(living)),
        len(living),
        len(rare) / max(1, len(rare) + len(living)),
    )

    size = counts[living].astype(np.float64)
    certain = counts[living] >= census
    while True:
        # Whoever would be drawn with a probability of one or more is taken with certainty.
        rest = ~certain
        room = min(n, int(rest.sum()))
        total = size[rest].sum()
        more = rest & (size * room >= total) if room else np.zeros_like(rest)
        if not more.any():
            break
        certain |= more
        n = room - int(more.sum())
    ranked = np.flatnonzero(rest)[np.argsort(u[rest] / size[rest], kind="stable")[:room]]
    weight = np.zeros(len(living))
    weight[certain] = size[certain]
    # Inclusion is in proportion to the rate, so each stands for an equal part of the firings.
    weight[ranked] = size[rest].sum() / max(1, len(ranked))
    taken = np.flatnonzero(weight > 0)
    weighted = Design(
        living[taken],
        weight[taken],
        certain[taken],
        len(living),
        float(rare.sum() / max(1, counts.sum())),
    )
    return Chosen(uniform, weighted)

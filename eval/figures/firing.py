"""How often latents fire: rates, dead latents, and the share of firings that frequent ones have.

A latent fires in a row where its code is not 0; that it was selected is not enough. Definitions:
docs/evaluation.md.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from bsc.array_file import read_arrays, write_arrays
from bsc.eval.evaluation import EvaluationFolder, Firing, Histogram
from bsc.eval.figures.intervals import LEVEL
from bsc.train.run import Run

__all__ = [
    "FREQUENT",
    "ULTRA",
    "dead_rate_bound",
    "firing_counts",
    "firing_figures",
    "write_firing_counts",
]

FREQUENT = (0.01, 0.1, 0.5)
"""Firing rates above which latents are counted."""
ULTRA = 0.1
"""Rate above which a latent is of ultra-high frequency."""
HISTOGRAM_EDGES = [x / 4 for x in range(-28, 1)]
"""log10 of the firing rate."""


def dead_rate_bound(rows: int) -> float:
    """Largest firing rate, at 95 % confidence, of a latent that fired in none of `rows` rows.

    Clopper and Pearson's one-sided bound, about 3 / rows. It takes rows as independent: a latent of
    one topic, silent because no document was about it, may fire more often elsewhere.

    >>> round(dead_rate_bound(1000), 6)
    0.002991
    """
    return float(1 - (1 - LEVEL) ** (1 / rows))


def write_firing_counts(run: Run, coder: str, counts: NDArray[np.int64]) -> None:
    """Keep beside a coder in how many rows each of its latents fired, (F,)."""
    write_arrays(EvaluationFolder(run).firing(coder), {"counts": counts})


def firing_counts(run: Run, coder: str) -> NDArray[np.int64]:
    """In how many rows each latent of a coder fired in the evaluation of its run, (F,).

    Raises:
        StoreError: the run was not evaluated, or the file is damaged.
    """
    folder = EvaluationFolder(run)
    return read_arrays(folder.firing(coder), folder.remedy)["counts"].astype(np.int64)


def firing_figures(counts: NDArray[np.int64], rows: int) -> Firing:
    """Figures about firing rates.

    Args:
        counts: (F,) rows in which each latent is not 0.
        rows: rows that were evaluated.
    """
    rates, firings = counts / rows, int(counts.sum())
    alive = np.clip(np.log10(rates[counts > 0]), HISTOGRAM_EDGES[0], HISTOGRAM_EDGES[-1])
    histogram, _ = np.histogram(alive, bins=HISTOGRAM_EDGES)
    return Firing(
        latents=len(counts),
        dead=int((counts == 0).sum()),
        dead_rate_bound=dead_rate_bound(rows),
        firings=firings,
        latents_above={str(t): int((rates > t).sum()) for t in FREQUENT},
        share_of_firings_above={
            str(t): float(counts[rates > t].sum() / max(1, firings)) for t in FREQUENT
        },
        ultra_per_token=float(counts[rates > ULTRA].sum() / rows),
        log10_rate_histogram=Histogram(edges=HISTOGRAM_EDGES, counts=[int(c) for c in histogram]),
    )

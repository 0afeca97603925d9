"""Contexts in which latents fire: samples by stratum, for all latents of a coder at once.

The firings of a latent are put in order of their margin (of a continuous latent that is its value)
and cut into ten strata of equal size. Within a stratum firings are drawn uniformly, so that what
is shown is what the latent usually does at that strength, not its best moments. Firings are
drawn apart in text that an explanation may be written from ("explain") and text that it is tested
on ("test"), which share nothing (figures/division.py).

Everything is drawn by hashes of (row, latent): whatever order or batches, the sample is the same.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from bsc.eval.figures.division import NEITHER, PARTS
from bsc.eval.passes.codes import LatentCode
from bsc.eval.passes.pieces import Arrays
from bsc.hashing import hash64

__all__ = [
    "STRATA",
    "Sample",
    "choose_latents",
    "ordered_bits",
    "sample",
]

STRATA = 10
PER_STRATUM = 8
"""Firings of each latent, stratum and part that are drawn at most."""
MIN_FIRINGS = 10
"""Fewer firings than strata are not shown."""


def ordered_bits(values: NDArray[np.float32]) -> NDArray[np.uint64]:
    """The bits of float32 numbers, turned so that they are in the order of the numbers."""
    bits = values.view(np.uint32)
    negative = bits >> np.uint32(31) == 1
    return np.where(negative, ~bits, bits | np.uint32(1 << 31)).astype(np.uint64)


def _argsort(*fields: tuple[NDArray[Any], int]) -> NDArray[np.int64]:
    """Order by several fields of whole numbers, the first one first, of as many bits each."""
    key = np.zeros(len(fields[0][0]), np.uint64)
    for values, bits in fields:
        key = key << np.uint64(bits) | values.astype(np.uint64)
    return np.argsort(key)


class Sample(NamedTuple):
    """Firings that were drawn, in order of (latent, stratum, part)."""

    latent: NDArray[np.uint32]
    row: NDArray[np.uint32]
    margin: NDArray[np.float32]
    stratum: NDArray[np.uint8]
    """0 is the weakest tenth of the latent's firings, 9 the strongest."""
    part: NDArray[np.uint8]
    """Index into `PARTS`."""

    def of(self, latent: int, part: str | None = None) -> Sample:
        """The firings of one latent, of one part or of both."""
        here = slice(*np.searchsorted(self.latent, [latent, latent + 1]))
        found = self.taken(here)
        return found if part is None else found.taken(found.part == PARTS.index(part))

    def taken(self, which: Any) -> Sample:
        """Some of the firings."""
        return Sample(**{name: values[which] for name, values in self._asdict().items()})

    def arrays(self) -> Arrays:
        """For a file."""
        return dict(self._asdict())


def sample(
    code: LatentCode,
    part: NDArray[np.uint8],
    *,
    per_stratum: int = PER_STRATUM,
    seed: int = 0,
) -> Sample:
    """Draw firings of every latent.

    Args:
        code: sorted by latent.
        part: (rows,) what every row of the split is for (division.py); rows for neither part are
            in strata but not drawn.
        per_stratum: firings of each latent, stratum and part at most.
        seed: of the draw.
    """
    drawn: list[list[NDArray[Any]]] = []
    for first, last in code.ranges():
        here = slice(int(code.offsets[first]), int(code.offsets[last]))
        n = np.diff(code.offsets[first : last + 1])
        latent = np.repeat(np.arange(first, last), n)
        row, margin = code.row[here], code.margin[here]
        priority = hash64(row.astype(np.uint64) << np.uint64(24) ^ latent.astype(np.uint64), seed)
        # One number to sort by: latent, margin, and of equal margins at random, not by the text.
        order = _argsort((latent - first, 17), (ordered_bits(margin), 32), (priority >> 49, 15))
        rank = np.empty(len(order), np.int64)
        rank[order] = np.arange(len(order)) - np.repeat(np.cumsum(n) - n, n)
        stratum = rank * STRATA // np.repeat(n, n)
        own = part[row].astype(np.int64)
        group = (((latent - first) * STRATA) + stratum) * (NEITHER + 1) + own
        order = _argsort((group, 22), (priority >> 22, 42))
        ordered = group[order]
        begins = np.flatnonzero(np.diff(ordered, prepend=-1))
        place = np.arange(len(ordered)) - np.repeat(begins, np.diff([*begins, len(ordered)]))
        kept = order[(place < per_stratum) & (own[order] != NEITHER)]
        drawn.append([a[kept] for a in (latent, row, margin, stratum, own)])
    columns = [np.concatenate(c) for c in zip(*drawn, strict=True)] if drawn else [np.empty(0)] * 5
    kinds = (np.uint32, np.uint32, np.float32, np.uint8, np.uint8)
    return Sample(*(c.astype(k) for c, k in zip(columns, kinds, strict=True)))


def choose_latents(counts: NDArray[np.int64], n: int) -> list[int]:
    """Latents at evenly spaced ranks of the firing rate, the most frequent first."""
    alive = np.flatnonzero(counts >= MIN_FIRINGS)
    if len(alive) == 0:
        return []
    ranked = alive[np.argsort(-counts[alive], kind="stable")]
    ranks = np.linspace(0, len(ranked) - 1, min(n, len(ranked))).round().astype(int)
    return [int(i) for i in dict.fromkeys(ranked[ranks])]

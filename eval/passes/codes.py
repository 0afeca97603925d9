"""The codes of a coder over a split, as `bsc eval` leaves them on disk, and the same by latent.

    RUN/eval/codes/<coder>/<piece>.safetensors    first_row (int64), row (uint32, counted from it),
                                                  latent (uint16, or uint32 above 65,536 latents),
                                                  margin (float32)

One entry for each firing: a latent whose code is not 0. `margin` is pre - theta: of a continuous
latent that is its value, of a binary one how far above its threshold it was.
"""

from __future__ import annotations

import itertools
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from bsc.errors import StoreError
from bsc.eval.passes.pieces import Pieces

__all__ = ["SORTED_IN_MEMORY", "Codes", "Firings", "LatentCode"]

SORTED_IN_MEMORY = 1 << 26
"""Firings that are sorted in memory; more of them go by way of a file without a name."""


class Firings(NamedTuple):
    """Firings in the order of the rows."""

    row: NDArray[np.int64]
    """Number of the row in the split."""
    latent: NDArray[np.int64]
    margin: NDArray[np.float32]


@dataclass(frozen=True)
class LatentCode:
    """A code sorted by latent: the firings of latent i are `offsets[i]` to `offsets[i + 1]`."""

    offsets: NDArray[np.int64]
    """(F + 1,)."""
    row: NDArray[np.uint32]
    """(M,), ascending within a latent."""
    margin: NDArray[np.float32]
    """(M,)."""

    @property
    def n_latents(self) -> int:
        """F."""
        return len(self.offsets) - 1

    def of(self, latent: int) -> tuple[NDArray[np.uint32], NDArray[np.float32]]:
        """Rows and margins of the firings of one latent."""
        here = slice(int(self.offsets[latent]), int(self.offsets[latent + 1]))
        return self.row[here], self.margin[here]

    def ranges(self, firings: int = 1 << 22, latents: int = 1 << 17) -> Iterator[tuple[int, int]]:
        """Ranges of latents to work on at a time: about `firings` firings, `latents` at most."""
        start = 0
        while start < self.n_latents:
            end = int(np.searchsorted(self.offsets, self.offsets[start] + firings, "right")) - 1
            end = min(self.n_latents, max(start + 1, min(end, start + latents)))
            yield start, end
            start = end


@dataclass(frozen=True)
class Codes:
    """Saved codes of one coder."""

    pieces: Pieces
    counts: NDArray[np.int64]
    """(F,) firings of each latent."""

    def __iter__(self) -> Iterator[Firings]:
        """Firings piece by piece."""
        for piece in itertools.takewhile(self.pieces.done, itertools.count()):
            arrays = self.pieces.read(piece)
            yield Firings(
                arrays["row"].astype(np.int64) + int(arrays["first_row"][0]),
                arrays["latent"].astype(np.int64),
                arrays["margin"],
            )

    def of(self, latent: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Rows and margins of the firings of one latent, in a pass over the code."""
        parts = [(f.row[f.latent == latent], f.margin[f.latent == latent]) for f in self]
        if not parts:
            return np.empty(0, np.int64), np.empty(0, np.float32)
        return np.concatenate([r for r, _ in parts]), np.concatenate([m for _, m in parts])

    def by_latent(self) -> LatentCode:
        """The code sorted by latent, in one pass: a counting sort, since the counts are known."""
        offsets = np.concatenate([[0], np.cumsum(self.counts)]).astype(np.int64)
        total = int(offsets[-1])
        row, margin = self._array(total, np.uint32), self._array(total, np.float32)
        cursor = offsets[:-1].copy()
        for firings in self:
            order = np.argsort(firings.latent, kind="stable")
            latent = firings.latent[order]
            here = np.bincount(latent, minlength=len(cursor))
            first = np.concatenate([[0], np.cumsum(here)])[:-1]
            place = cursor[latent] + np.arange(len(latent)) - first[latent]
            row[place], margin[place] = firings.row[order], firings.margin[order]
            cursor += here
        if not np.array_equal(cursor, offsets[1:]):
            raise StoreError(
                f"{self.pieces.folder}: these codes are not those of the evaluation. Remove the "
                f"folder and run `bsc eval` again."
            )
        return LatentCode(offsets, row, margin)

    def _array(self, n: int, dtype: type[Any]) -> NDArray[Any]:
        if n <= SORTED_IN_MEMORY:
            return np.empty(n, dtype)
        # Beside the codes; gone when it is closed.
        with tempfile.TemporaryFile(dir=Path(self.pieces.folder)) as file:
            try:  # a map of a file that the disk has no room for would end the process
                os.posix_fallocate(file.fileno(), 0, n * np.dtype(dtype).itemsize)
            except OSError as error:
                raise StoreError(
                    f"{self.pieces.folder}: no room to sort {n:,} firings by latent ({error}). "
                    f"Make room, or evaluate on fewer rows with --rows."
                ) from None
            return np.memmap(file, dtype=dtype, mode="r+", shape=(n,))

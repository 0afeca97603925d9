"""Coders and codes whose figures are known beforehand."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from bsc.cache.model.attention import BY_POSITIONS
from bsc.cache.store.split import Moments
from bsc.eval.passes.codes import Codes, LatentCode
from bsc.eval.passes.contexts import Contexts
from bsc.eval.passes.pieces import Pieces
from bsc.train.coders.coder import SparseCoder, parameter_shapes
from bsc.train.coders.config import CoderConfig


def zeros(config: CoderConfig) -> SparseCoder:
    return SparseCoder(config, {n: torch.zeros(s) for n, s in parameter_shapes(config).items()})


def identity(width: int) -> SparseCoder:
    """Every channel as a pair of latents, y+ and y-: k = width are enough for any row."""
    coder = zeros(CoderConfig(site="sae", k=width, n_latents=2 * width, d_in=width, d_out=width))
    both = torch.cat([torch.eye(width), -torch.eye(width)])
    coder.W_enc.copy_(both)
    coder.W_dec.copy_(both)
    return coder


def latent_code(dense: NDArray[np.float32]) -> LatentCode:
    """The code sorted by latent of a dense one, (rows, F); 0 is silent."""
    latent, row = np.nonzero(dense.T)
    offsets = np.concatenate([[0], np.cumsum((dense != 0).sum(axis=0))])
    return LatentCode(offsets, row.astype(np.uint32), dense.T[latent, row].astype(np.float32))


def saved_codes(folder: Path, dense: NDArray[np.float32], pieces: int = 2) -> Codes:
    """The same on disk, in some pieces."""
    place = Pieces.open(folder, {"test": folder.name})
    for i, part in enumerate(np.array_split(np.arange(len(dense)), pieces)):
        row, latent = np.nonzero(dense[part])
        place.write(i, {
            "first_row": np.array([part[0]]),
            "row": row.astype(np.uint32),
            "latent": latent.astype(np.uint16),
            "margin": dense[part][row, latent].astype(np.float32),
        })  # fmt: skip
    return Codes(place, (dense != 0).sum(axis=0))


def planted_contexts(n: int, predicted: int) -> Contexts:
    """Contexts of one document each, with some predicted tokens."""
    ids = np.zeros((n, predicted + 1), np.int64)
    ones = np.ones(ids.shape, bool)
    return Contexts(
        ids,
        ids,
        ones,
        ones[:, 1:],
        "joined",
        BY_POSITIONS,
        np.arange(n)[:, None] + 0 * ids[:, 1:],
        ones[:, 1:],
    )


class Part(NamedTuple):
    """Rows of a shard."""

    rows: torch.Tensor

    def part(self, start: int, stop: int) -> torch.Tensor:
        return self.rows[start:stop]


class Rows:
    """A split of one shard that is in memory: any rows of one hookpoint, input and output alike."""

    where = "memory"
    shards = 1

    def __init__(self, rows: torch.Tensor, document: NDArray[np.int64]) -> None:
        self._rows, self._document = rows, document
        self.rows = len(rows)
        self.grid = SimpleNamespace(shard_rows=len(rows))

    def shard_rows(self, name: str, shard: int) -> Part:
        return Part(self._rows)

    def non_finite_rows(self, name: str) -> int:
        return 0

    def moments(self, name: str) -> Moments:
        rows = self._rows.double()
        return Moments(self.rows, rows.mean(dim=0), rows.var(dim=0, correction=0))

    def tokens(self, name: str) -> NDArray[np.int64]:
        assert name == "doc_id"
        return self._document

"""How well the batches of a store are shuffled, measured on its own token arrays.

Rows of one document are alike, so a batch with many rows of few documents is worth fewer rows than
it has. With n_u rows of document u in a batch of B, the variance of the batch's mean of an effect
that is constant within documents is sum n_u^2 / B times that of one row. The design effect is this
over what independent draws from the store give, 1 + (B - 1) sum p_u^2, p_u the share of document u
(Kish 1965, the design effect of cluster samples).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bsc.cache.store.loader import Group, Loader
from bsc.cache.store.store import ActivationStore
from bsc.errors import StoreError

__all__ = ["ShuffleQuality", "check_shuffle"]

_CENSUS_ROWS = 100_000_000
"""Stores up to this many rows have the shares of their documents counted; larger ones have so many
documents that independent draws meet none twice."""


@dataclass(frozen=True)
class ShuffleQuality:
    """Figures of some batches of an epoch."""

    batches: int
    batch_rows: int
    design_effect: float
    """Mean over batches."""
    documents: float
    """Distinct documents in a batch, mean."""
    documents_if_independent: float | None
    """The same of independent draws; None in stores too large to count."""

    def to_json(self) -> dict[str, Any]:
        """The figures for machines."""
        return asdict(self)

    def line(self) -> str:
        """The figures for people."""
        against = (
            f" ({self.documents_if_independent:,.0f} if drawn independently)"
            if self.documents_if_independent is not None
            else ""
        )
        return (
            f"design effect {self.design_effect:.3f}, {self.documents:,.0f} distinct documents"
            f"{against} in a batch of {self.batch_rows:,} rows; mean of {self.batches} batches"
        )


class _DocumentBatches(Loader):
    """The loader's own order, with the documents of the rows instead of their activations."""

    documents: NDArray[np.uint32]

    def _gather(
        self, group: Group, rows: NDArray[np.int32], buffers: list[torch.Tensor], at: int
    ) -> None:
        owner, place = np.divmod(rows, self.split.grid.shard_rows)
        for i, shard in enumerate(group.shards):
            mine = np.flatnonzero(owner == i)
            document = self.split.shard("tokens/doc_id", shard)
            self.documents[at + mine] = document[place[mine]]


def check_shuffle(
    store: ActivationStore, *, batch_rows: int = 8192, batches: int = 64, seed: int = 0
) -> ShuffleQuality:
    """Measure the shuffle of a store's training batches.

    Args:
        store: with committed rows.
        batch_rows: rows in a batch; fewer in a store that has fewer.
        batches: how many to look at.
        seed: of their order.

    Raises:
        StoreError: the store has no training rows.
    """
    split = store.train
    if split.rows == 0:
        raise StoreError(f"{store.folder}: no committed training rows yet.")
    batch_rows = min(batch_rows, split.rows)
    batches = max(1, min(batches, split.rows // batch_rows))
    loader = _DocumentBatches(split, (), batch_rows=batch_rows, seed=seed)
    loader.documents = np.empty(batch_rows, np.uint32)
    squares, distinct = [], []
    for _ in islice(loader.batches(), batches):
        counts = np.unique(loader.documents, return_counts=True)[1].astype(np.float64)
        squares.append(np.square(counts).sum() / batch_rows)
        distinct.append(len(counts))
    independent, expected = 1.0, None
    if split.rows <= _CENSUS_ROWS:
        shares = np.unique(split.tokens("doc_id"), return_counts=True)[1] / split.rows
        independent = 1 + (batch_rows - 1) * float(np.square(shares).sum())
        expected = float((1 - (1 - shares) ** batch_rows).sum())
    return ShuffleQuality(
        batches,
        batch_rows,
        float(np.mean(squares)) / independent,
        float(np.mean(distinct)),
        expected,
    )

"""Held-out contexts, as the model saw them in the capture."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from bsc.cache.model.attention import BY_POSITIONS, Separation, forward_inputs
from bsc.cache.model.models import LanguageModel
from bsc.cache.store.store import ActivationStore
from bsc.errors import StoreError
from bsc.eval.passes.batches import document_numbers

__all__ = ["Contexts", "contexts_of"]


class Contexts(NamedTuple):
    """Held-out contexts as the model saw them in the capture. Arrays are (contexts, length)."""

    token_id: NDArray[np.int64]
    position: NDArray[np.int64]
    real: NDArray[np.bool_]
    """Which tokens are not padding."""
    predicted: NDArray[np.bool_]
    """(contexts, length - 1): tokens whose loss counts, from the second one on. The first token of
    a document is not predicted where the model cannot see the document before."""
    packing: str
    separation: Separation
    document: NDArray[np.int64]
    """(contexts, length - 1) number of the document of each token from the second one on."""
    unseen: NDArray[np.bool_]
    """(contexts, length - 1): tokens, from the second one on, whose text was not trained on word
    for word (capture/overlap.py). All, where that is not known."""

    @property
    def documents(self) -> int:
        """Documents that the numbers go up to."""
        return int(self.document.max()) + 1

    @property
    def counts(self) -> NDArray[np.int64]:
        """(documents,) predicted tokens of each document."""
        return np.bincount(self.document[self.predicted], minlength=self.documents)

    @property
    def unseen_counts(self) -> NDArray[np.int64]:
        """(documents,) predicted tokens of each document that were not seen in training."""
        return np.bincount(self.document[self.predicted & self.unseen], minlength=self.documents)

    def first(self, tokens: int) -> Contexts:
        """The first contexts, of up to `tokens` tokens, and one at least."""
        n = max(1, int(np.searchsorted(np.cumsum(self.real.sum(axis=1)), tokens, "right")))
        return self._replace(
            token_id=self.token_id[:n],
            position=self.position[:n],
            real=self.real[:n],
            predicted=self.predicted[:n],
            document=self.document[:n],
            unseen=self.unseen[:n],
        )

    def inputs(self, part: slice, lm: LanguageModel) -> dict[str, torch.Tensor]:
        """Arguments of the model's forward pass for some of the contexts."""
        device, dtype = lm.model.device, lm.model.dtype
        ids, position, real = (
            torch.from_numpy(a[part]).to(device) for a in (self.token_id, self.position, self.real)
        )
        return forward_inputs(
            ids, position, packing=self.packing, separation=self.separation, real=real, dtype=dtype
        )


def contexts_of(
    store: ActivationStore, max_tokens: int, separation: Separation = BY_POSITIONS
) -> Contexts:
    """Contexts of the held-out split, whose rows are in order.

    Args:
        store: of the capture.
        max_tokens: tokens to take at most, and one context at least.
        separation: how the model keeps documents apart (model/attention.py).

    Raises:
        StoreError: the split holds no whole context.
    """
    split, length = store.held_out, store.context
    ids = split.tokens("token_id").astype(np.int64)
    position = split.tokens("position").astype(np.int64)
    seen = store.seen_rows()
    unseen = np.ones(len(ids), bool) if seen is None else ~seen
    if store.packing == "none":
        return _of_documents(store, ids, position, unseen, max_tokens)
    n = min(len(ids) // length, max(1, max_tokens // length))
    if n == 0:
        raise StoreError(f"{split.where}: the held-out rows hold no whole context of {length}.")
    shape = (n, length)
    ids, position = ids[: n * length].reshape(shape), position[: n * length].reshape(shape)
    if position[:, 0].any():
        raise StoreError(f"{split.where}: the held-out rows are not whole contexts of {length}.")
    predicted = np.ones((n, length - 1), bool)
    if store.packing == "masked":
        predicted = position[:, 1:] != 0
    document = document_numbers(split)[: n * length].reshape(shape)[:, 1:]
    return Contexts(
        ids,
        position,
        np.ones(shape, bool),
        predicted,
        store.packing,
        separation,
        document,
        unseen[: n * length].reshape(shape)[:, 1:],
    )


def _of_documents(
    store: ActivationStore,
    ids: NDArray[np.int64],
    position: NDArray[np.int64],
    unseen: NDArray[np.bool_],
    max_tokens: int,
) -> Contexts:
    """Contexts of one document each, padded to the longest."""
    starts = np.flatnonzero(position == 0)
    ends = np.append(starts[1:], len(position))
    # Where another writer's shard follows, a context is cut short.
    whole = [_run(position[a:b]) for a, b in zip(starts, ends, strict=True)]
    ends = np.minimum(ends, starts + whole)
    lengths = ends - starts
    taken = np.flatnonzero((lengths > 1) & (np.cumsum(lengths) <= max(max_tokens, lengths[0])))
    if len(taken) == 0:
        raise StoreError(f"{store.folder}: the held-out rows hold no context of two tokens.")
    shape = (len(taken), int(lengths[taken].max()))
    token_id, real = np.zeros(shape, np.int64), np.zeros(shape, bool)
    new = np.ones(shape, bool)
    for row, i in enumerate(taken):
        token_id[row, : lengths[i]], real[row, : lengths[i]] = ids[starts[i] : ends[i]], True
        new[row, : lengths[i]] = unseen[starts[i] : ends[i]]
    at = np.broadcast_to(np.arange(shape[1]), shape).copy()
    of_context = document_numbers(store.held_out)[starts[taken]]
    document = np.broadcast_to(of_context[:, None], (shape[0], shape[1] - 1))
    return Contexts(
        token_id, at, real, real[:, 1:], store.packing, BY_POSITIONS, document, new[:, 1:]
    )


def _run(position: NDArray[np.int64]) -> int:
    """Tokens until positions stop counting up by one."""
    breaks = np.flatnonzero(np.diff(position) != 1)
    return int(breaks[0]) + 1 if len(breaks) else len(position)

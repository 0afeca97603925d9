"""Cross-entropy of the language model, as it is and with something spliced in.

All losses are in nats per predicted token, over the same held-out contexts, so that differences
are paired token by token. Intervals are bootstrapped over contexts.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from bsc.cache.attention import Separation, forward_inputs
from bsc.cache.models import LanguageModel
from bsc.cache.store import ActivationStore
from bsc.errors import StoreError
from bsc.eval.splice import Replacement, splice

__all__ = ["Contexts", "context_losses", "contexts_of", "paired_difference"]

_TOKENS_AT_ONCE = 8_192
_RESAMPLES = 2_000


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

    @property
    def counts(self) -> NDArray[np.int64]:
        """Predicted tokens of each context."""
        return np.asarray(self.predicted.sum(axis=1), dtype=np.int64)

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
    store: ActivationStore, max_tokens: int, separation: Separation = "positions"
) -> Contexts:
    """Contexts of the held-out split, whose rows are in order.

    Args:
        store: of the capture.
        max_tokens: tokens to take at most, and one context at least.
        separation: how the model keeps documents apart (cache/attention.py).

    Raises:
        StoreError: the split holds no whole context.
    """
    split, length = store.held_out, store.context
    ids = split.tokens("token_id").astype(np.int64)
    position = split.tokens("position").astype(np.int64)
    if store.packing == "none":
        return _of_documents(store, ids, position, max_tokens)
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
    return Contexts(ids, position, np.ones(shape, bool), predicted, store.packing, separation)


def _of_documents(
    store: ActivationStore, ids: NDArray[np.int64], position: NDArray[np.int64], max_tokens: int
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
    for row, i in enumerate(taken):
        token_id[row, : lengths[i]], real[row, : lengths[i]] = ids[starts[i] : ends[i]], True
    at = np.broadcast_to(np.arange(shape[1]), shape).copy()
    return Contexts(token_id, at, real, real[:, 1:], store.packing, "positions")


def _run(position: NDArray[np.int64]) -> int:
    """Tokens until positions stop counting up by one."""
    breaks = np.flatnonzero(np.diff(position) != 1)
    return int(breaks[0]) + 1 if len(breaks) else len(position)


@torch.inference_mode()
def context_losses(
    lm: LanguageModel, contexts: Contexts, replacements: dict[str, Replacement]
) -> NDArray[np.float64]:
    """Sum of the losses of each context's predicted tokens, (contexts,), in nats.

    Args:
        lm: a model with its head.
        contexts: what the model reads.
        replacements: what to splice in, by hookpoint; empty for the model as it is.
    """
    at_once = max(1, _TOKENS_AT_ONCE // contexts.token_id.shape[1])
    losses = []
    with splice(lm.base, replacements):
        for start in range(0, len(contexts.token_id), at_once):
            part = slice(start, start + at_once)
            inputs = contexts.inputs(part, lm)
            logits = lm.model(**inputs, use_cache=False).logits[:, :-1]
            nats = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1).float(), inputs["input_ids"][:, 1:].flatten(), reduction="none"
            )
            counted = torch.from_numpy(contexts.predicted[part]).to(nats.device)
            losses.append((nats.view(counted.shape).double() * counted).sum(dim=1).cpu().numpy())
    return np.concatenate(losses)


def paired_difference(
    changed: NDArray[np.float64],
    clean: NDArray[np.float64],
    counts: NDArray[np.int64],
    *,
    seed: int = 0,
) -> tuple[float, tuple[float, float]]:
    """Mean of changed - clean per predicted token with its 95 % interval, over contexts.

    Args:
        changed: summed losses with something spliced in, (contexts,).
        clean: summed losses of the same contexts without.
        counts: predicted tokens of each context.
        seed: of the resampling of contexts.
    """
    difference = changed - clean
    rng = np.random.Generator(np.random.Philox(key=seed))
    drawn = rng.integers(0, len(difference), size=(_RESAMPLES, len(difference)))
    resampled = difference[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
    low, high = np.quantile(resampled, [0.025, 0.975])
    return float(difference.sum() / counts.sum()), (float(low), float(high))

"""What the language model predicts, as it is and with something spliced in.

Losses are in nats per predicted token, over the same held-out contexts, so that differences are
paired token by token; sums are kept by document. Definitions: docs/evaluation.md.
"""

from __future__ import annotations

from collections.abc import Collection, Generator, Iterable, Mapping
from contextlib import ExitStack
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from bsc.cache.model.models import LanguageModel
from bsc.eval.passes.contexts import Contexts
from bsc.eval.passes.pieces import Arrays, Pieces
from bsc.eval.passes.prefix import Prefix
from bsc.eval.passes.splice import Replacement, splice
from bsc.eval.passes.sums import add_to

__all__ = [
    "CLEAN",
    "LossSums",
    "Piece",
    "Variant",
    "joined",
    "pass_over_contexts",
    "slices",
]

_TOKENS_AT_ONCE = 8_192
_LOGITS_AT_ONCE = 1 << 28
"""Logits of one forward pass at most: those of the clean model are kept in float32, 1 GiB."""
_LOGITS_AT_A_TIME = {"cpu": 1 << 21, "cuda": 1 << 26}
"""Logits that are turned into losses at a time, in float32: on a CPU as many as stay in its cache,
on a GPU as many as keep it busy and take 256 MiB for each array."""

CLEAN = "clean"
"""Name of the model as it is, beside the variants."""

Variant = dict[str, Replacement]
"""What is spliced in, by hookpoint."""


class LossSums(NamedTuple):
    """Sums over the predicted tokens of each document, (documents,) float64."""

    nats: NDArray[np.float64]
    """Cross-entropy of the next token."""
    kl: NDArray[np.float64]
    """KL divergence of the spliced model's distribution from the clean one's, in nats: sum over the
    vocabulary of p_clean log(p_clean / p_spliced)."""
    right: NDArray[np.float64]
    """Tokens that were predicted right: the most likely token is the next one."""
    nats_unseen: NDArray[np.float64]
    """`nats` of the tokens that were not seen in training."""


def _batches(contexts: Contexts, lm: LanguageModel) -> list[slice]:
    vocabulary = int(lm.model.get_input_embeddings().weight.shape[0])
    tokens = min(_TOKENS_AT_ONCE, _LOGITS_AT_ONCE // vocabulary)
    at_once = max(1, tokens // contexts.token_id.shape[1])
    n = len(contexts.token_id)
    return [slice(i, min(i + at_once, n)) for i in range(0, n, at_once)]


def _logits(lm: LanguageModel, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """(predictions, vocabulary) in the model's dtype: of each token but the last of its context."""
    logits: torch.Tensor = lm.model(**inputs, use_cache=False).logits
    return logits[:, :-1].flatten(0, 1)


class _Clean(NamedTuple):
    """What the model as it is predicts for a batch of contexts."""

    log_p: torch.Tensor
    """(predictions, vocabulary) float32."""
    target: torch.Tensor
    """(predictions,) the next token."""
    document: torch.Tensor
    """(predictions,) document of each, from 0; `documents` for those that do not count."""
    documents: int
    unseen: torch.Tensor
    """(predictions,) float32, 1 where the next token was not seen in training."""


def _sums(clean: _Clean, logits: torch.Tensor) -> LossSums:
    """Sums of a batch of contexts, worked out some predictions at a time."""
    nats, kl, right = (torch.empty(len(logits), device=logits.device) for _ in range(3))
    for here in slices(logits):
        log_q = torch.log_softmax(logits[here].float(), dim=-1)
        target = clean.target[here]
        nats[here] = -log_q.gather(-1, target.unsqueeze(-1)).squeeze(-1)
        kl[here] = _divergence(clean.log_p[here], log_q)
        right[here] = (log_q.argmax(dim=-1) == target).float()
    sums = []
    for values in (nats, kl, right, nats * clean.unseen):
        total = torch.zeros(clean.documents + 1, dtype=torch.float64, device=logits.device)
        add_to(total, clean.document, values.double())
        sums.append(total)
    return LossSums(*torch.stack(sums).cpu().numpy()[:, :-1])  # the device is waited for once


def slices(logits: torch.Tensor) -> list[slice]:
    """Predictions that are worked on together."""
    at_once = max(1, _LOGITS_AT_A_TIME.get(logits.device.type, 1 << 21) // logits.shape[1])
    return [slice(i, i + at_once) for i in range(0, len(logits), at_once)]


def _divergence(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """KL divergence of q from p, (rows,), of log probabilities (rows, vocabulary).

    As sum p (d + exp(-d) - 1) with d = log p - log q: that is sum p d, for q sums to 1. No term is
    negative, and an error that all logarithms of a row share, as of their float32 sum, cancels.
    """
    d = log_p - log_q
    # exp(-d) may overflow there, and p be 0. A GPU would be waited for to know.
    small = d.device.type != "cpu" or bool(d.min() < -20)
    terms = torch.expm1(-d).add_(d).mul_(log_p.exp())
    if small:
        terms = torch.where(d < -20, log_q.exp() - log_p.exp() * (1 - d), terms)
    return terms.sum(dim=-1)


class Piece(NamedTuple):
    """Sums of a batch of contexts."""

    tokens: int
    """Predicted ones."""
    first: int
    """Number of the document that the sums begin with."""
    sums: dict[str, LossSums]
    """By variant."""


@torch.inference_mode()
def pass_over_contexts(
    lm: LanguageModel,
    contexts: Contexts,
    variants: Mapping[str, Variant],
    pieces: Pieces | None = None,
    *,
    without_tokens: Collection[int] = (),
) -> Generator[Piece]:
    """Predict every context with the model as it is and with every variant.

    The layers before a splice run once for all variants (passes/prefix.py).

    Args:
        lm: a model with its head.
        contexts: what the model reads.
        variants: what to splice in, by name; `CLEAN` is added.
        pieces: where the sums of each batch of contexts go and are taken from if there.
        without_tokens: token ids whose rows are left as they are in every splice, where coders
            were not trained on them.

    Yields:
        The sums of each batch of contexts.
    """
    prefixes: dict[tuple[str, ...], Prefix] = {}
    for variant in variants.values():
        prefixes.setdefault(tuple(variant), Prefix(lm.base, variant))
    tried = False
    names = [CLEAN, *variants]
    for piece, part in enumerate(_batches(contexts, lm)):
        predicted, document = contexts.predicted[part], contexts.document[part]
        tokens = int(predicted.sum())
        first, last = int(document.min()), int(document.max())
        if pieces is not None and pieces.done(piece):
            yield Piece(tokens, first, _from_arrays(pieces.read(piece), names))
            continue
        inputs = contexts.inputs(part, lm)
        with ExitStack() as stack:
            for prefix in prefixes.values():
                stack.enter_context(prefix.recorded())
            logits = _logits(lm, inputs)
        clean = _Clean(
            _log_softmax(logits),
            inputs["input_ids"][:, 1:].flatten(),
            torch.from_numpy(np.where(predicted, document - first, last - first + 1).ravel()).to(
                lm.model.device
            ),
            last - first + 1,
            torch.from_numpy(contexts.unseen[part].ravel()).to(lm.model.device, torch.float32),
        )
        if not tried:
            tried = True
            for prefix in prefixes.values():
                prefix.try_out(lm.model, inputs)
        found = {CLEAN: _sums(clean, logits)}
        kept = None
        if without_tokens:
            ids = torch.tensor(sorted(without_tokens), device=lm.model.device)
            kept = torch.isin(inputs["input_ids"], ids).flatten()
        for name, variant in variants.items():
            with splice(lm.base, variant, kept), prefixes[tuple(variant)].left_out():
                spliced = _logits(lm, inputs)
            found[name] = _sums(clean, spliced)
        if pieces is not None:
            pieces.write(piece, _to_arrays(found, names))
        yield Piece(tokens, first, found)


def _log_softmax(logits: torch.Tensor) -> torch.Tensor:
    """In float32, some rows at a time."""
    found = torch.empty(logits.shape, device=logits.device)
    for here in slices(logits):
        found[here] = torch.log_softmax(logits[here].float(), dim=-1)
    return found


def _to_arrays(found: Mapping[str, LossSums], names: list[str]) -> Arrays:
    return {
        field: np.stack([getattr(found[name], field) for name in names])
        for field in LossSums._fields
    }


def _from_arrays(arrays: Arrays, names: list[str]) -> dict[str, LossSums]:
    return {
        name: LossSums(*(arrays[field][i] for field in LossSums._fields))
        for i, name in enumerate(names)
    }


def joined(pieces: Iterable[Piece], documents: int) -> dict[str, LossSums]:
    """The sums of all batches of contexts, by variant, each (documents,)."""
    found: dict[str, LossSums] = {}
    for piece in pieces:
        for name, sums in piece.sums.items():
            if name not in found:
                found[name] = LossSums(*(np.zeros(documents) for _ in sums))
            for total, part in zip(found[name], sums, strict=True):
                total[piece.first : piece.first + len(part)] += part
    return found

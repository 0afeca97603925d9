"""Codes and rows of texts, pooled over their tokens: what probes are trained on."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse

from bsc.cache.model.attention import forward_inputs
from bsc.cache.model.hookpoints import RowTap
from bsc.cache.model.models import LanguageModel
from bsc.errors import UserError
from bsc.eval.passes.batches import rows_at_once
from bsc.train.coders.coder import SparseCoder

__all__ = ["POOLINGS", "Features", "pooled_codes"]

POOLINGS = ("mean", "max", "last")

Features = dict[str, sparse.csr_matrix]
"""By pooling: (texts, F)."""


@torch.inference_mode()
def pooled_codes(
    lm: LanguageModel,
    texts: Sequence[str],
    coders: Mapping[str, tuple[str, SparseCoder]],
    *,
    without_tokens: Collection[int],
    length: int,
    batch: int = 64,
) -> tuple[dict[str, Features], dict[str, Features]]:
    """Features of texts: pooled codes of every coder, and pooled rows, in one pass of the model.

    Args:
        lm: the model.
        texts: what it reads, each by itself.
        coders: hookpoint and coder by name.
        without_tokens: token ids whose rows the coders were trained without.
        length: tokens of each text.
        batch: texts at a time.

    Returns:
        Features by coder, and by ``"<hookpoint>/<side>"``. Special tokens and rows of a hookpoint
        that are not finite are left out.
    """
    hooks = list(dict.fromkeys(hook for hook, _ in coders.values()))
    sides = dict.fromkeys(f"{hook}/{coder.config.side}" for hook, coder in coders.values())
    device = lm.model.device
    tap = RowTap(lm.base, hooks)
    widest = max(coder.config.n_latents for _, coder in coders.values())
    batch = max(1, min(batch, rows_at_once(widest) // length))
    left_out = sorted({*lm.tokenizer.all_special_ids, *without_tokens})
    special = torch.tensor(left_out, device=device)
    ids = _tokenise(lm, texts, length, left_out)
    by_coder: dict[str, list[Features]] = {name: [] for name in coders}
    by_side: dict[str, list[Features]] = {name: [] for name in sides}
    for start in range(0, len(texts), batch):
        part = ids[start : start + batch]
        width = max(map(len, part))
        tokens = torch.zeros((len(part), width), dtype=torch.int64)
        real = torch.zeros((len(part), width), dtype=torch.bool)
        for i, one in enumerate(part):
            tokens[i, : len(one)], real[i, : len(one)] = torch.tensor(one), True
        tokens, real = tokens.to(device), real.to(device)
        position = torch.arange(width, device=device).expand(len(part), -1)
        inputs = forward_inputs(tokens, position, packing="none", real=real, dtype=lm.model.dtype)
        rows = tap.rows(inputs)
        counted = (real & ~torch.isin(tokens, special)).flatten()
        of_text = torch.arange(len(part), device=device).repeat_interleave(width)
        kept = {hook: counted & _finite(rows, hook) for hook in hooks}
        texts_of = {hook: of_text[on].cpu().numpy() for hook, on in kept.items()}
        for name, (hook, coder) in coders.items():
            x = rows[f"{hook}/{coder.config.side}"][kept[hook]].to(coder.dtype)
            code = coder.encode(x)
            on = (code.value != 0).cpu()
            row = torch.arange(len(x)).repeat_interleave(on.sum(dim=1))
            by_coder[name].append(
                _pool(
                    texts_of[hook],
                    row.numpy(),
                    code.latent.cpu()[on].numpy(),
                    code.value.cpu()[on].double().numpy(),
                    (len(part), coder.config.n_latents),
                )
            )
        for side, found in by_side.items():
            hook = side.rpartition("/")[0]
            x = rows[side][kept[hook]].double().cpu()
            n, width = x.shape
            found.append(
                _pool(
                    texts_of[hook],
                    np.repeat(np.arange(n), width),
                    np.tile(np.arange(width), n),
                    x.numpy().ravel(),
                    (len(part), width),
                )
            )
    return _stacked(by_coder), _stacked(by_side)


def _finite(rows: Mapping[str, torch.Tensor], hook: str) -> torch.Tensor:
    """Rows of a hookpoint that are finite on both sides, (rows,) bool."""
    return rows[f"{hook}/input"].isfinite().all(1) & rows[f"{hook}/output"].isfinite().all(1)


def _tokenise(
    lm: LanguageModel, texts: Sequence[str], length: int, left_out: Collection[int]
) -> list[list[int]]:
    """Token ids of each text with the separator that a capture puts before a document."""
    from bsc.cache.model.tokens import tokenise

    found = [ids[:length] for ids in tokenise(lm.tokenizer, list(texts))]
    for text, ids in zip(texts, found, strict=True):
        if not set(ids).difference(left_out):
            raise UserError(f"--probe: the text {text[:40]!r} has no token to probe.")
    return found


def _stacked(parts: dict[str, list[Features]]) -> dict[str, Features]:
    """One matrix of many. Takes the parts out, which together would be as much memory again."""
    stacked: dict[str, Features] = {}
    for name in list(parts):
        found = parts.pop(name)
        stacked[name] = {p: sparse.vstack([f.pop(p) for f in found]).tocsr() for p in POOLINGS}
    return stacked


def _pool(
    text: NDArray[np.int64],
    row: NDArray[np.int64],
    latent: NDArray[np.int64],
    value: NDArray[np.float64],
    shape: tuple[int, int],
) -> Features:
    """Pool entries over the tokens of each text.

    Args:
        text: (rows,) text of each row, ascending.
        row: (M,) row of each entry.
        latent: (M,) its column.
        value: (M,).
        shape: texts and columns.
    """
    tokens = np.bincount(text, minlength=shape[0])
    of = text[row]
    key, place = np.unique(of * shape[1] + latent, return_inverse=True)
    where = (key // shape[1], key % shape[1])
    mean = np.bincount(place, value, len(key)) / np.maximum(1, tokens[where[0]])
    # A latent that is off on some token has a maximum of 0 at least.
    largest = np.full(len(key), -np.inf)
    np.maximum.at(largest, place, value)
    silent = np.bincount(place, minlength=len(key)) < tokens[where[0]]
    largest[silent] = np.maximum(largest[silent], 0)
    ends = np.cumsum(tokens) - 1
    last = row == ends[of]
    return {
        "mean": sparse.csr_matrix((mean, where), shape=shape),
        "max": sparse.csr_matrix((largest, where), shape=shape),
        "last": sparse.csr_matrix((value[last], (of[last], latent[last])), shape=shape),
    }

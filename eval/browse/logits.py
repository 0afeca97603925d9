"""Tokens that a latent's decoder row promotes and suppresses, by the direct path to the logits.

    effect[j, t] = (W_U[t] - mean of W_U) . (g * d_j)

with d_j less its mean where the final norm takes the mean away. What is the same for all tokens
changes no probability, so the mean over the vocabulary is taken off. d_j is the latent's decoder
row, g the gain of the model's final norm, W_U its unembedding. The effect is per unit of the
latent's value and before the norm divides by the length of the residual stream. What later layers
make of the row is not in it, so it says less the earlier the layer.
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bsc.cache.model.kinds import base_of

__all__ = ["Effects", "Unembedding", "adds_to_the_stream", "unembedding"]

PROMOTED = 10
"""Tokens of either sign of each latent."""
_AT_ONCE = 1 << 25
"""Effects that are in memory at a time."""


class Effects(NamedTuple):
    """The largest and the smallest effects of each latent, in order."""

    promoted: NDArray[np.int64]
    """(F, PROMOTED) tokens."""
    promotion: NDArray[np.float32]
    """(F, PROMOTED)."""
    suppressed: NDArray[np.int64]
    suppression: NDArray[np.float32]


class Unembedding(NamedTuple):
    """From the residual stream to logits, as far as it is linear."""

    weight: Tensor
    """(V, d) W_U less the mean of its rows, with the gain of the final norm in its columns."""
    centres: bool
    """Whether the final norm takes the mean away."""

    def effects(self, W_dec: Tensor) -> Tensor:
        """(F, V) effects of decoder rows, (F, d)."""
        rows = W_dec.to(self.weight.device, torch.float32)
        if self.centres:
            rows = rows - rows.mean(dim=1, keepdim=True)
        return rows @ self.weight.T

    @torch.inference_mode()
    def largest(self, W_dec: Tensor) -> Effects:
        """The largest effects of each row, some rows at a time."""
        n = min(PROMOTED, len(self.weight))
        parts: list[tuple[Tensor, ...]] = []
        for rows in W_dec.split(max(1, _AT_ONCE // len(self.weight))):
            effects = self.effects(rows)
            up, down = effects.topk(n, dim=1), effects.topk(n, dim=1, largest=False)
            parts.append((up.indices, up.values, down.indices, down.values))
        return Effects(*(torch.cat(column).cpu().numpy() for column in zip(*parts, strict=True)))


@torch.inference_mode()
def unembedding(model: Any) -> Unembedding | None:
    """The direct path of a model with its head; None where it has no final norm or no head.

    The final norm is the module whose output the head reads. Its gain is measured on a vector of
    +1 and -1, of mean 0, so how a model writes it (as g or as 1 + g) does not matter.
    """
    head = model.get_output_embeddings()
    if head is None or not isinstance(getattr(head, "weight", None), Tensor):
        return None
    width, device = head.weight.shape[1], head.weight.device
    norm = _final_norm(model, head)
    if norm is None or width % 2:
        return None
    norm = copy.deepcopy(norm).float()
    same = torch.ones((1, 1, width), device=device)
    signs = same.clone()
    signs[..., 1::2] = -1
    up, down, flat = norm(signs), norm(-signs), norm(same)
    gain = ((up - down) / 2 * signs).reshape(-1)
    centres = (flat - (up + down) / 2).abs().max() < 0.1 * gain.abs().max()
    weight = head.weight.float()
    return Unembedding((weight - weight.mean(dim=0)) * gain, bool(centres))


@torch.inference_mode()
def adds_to_the_stream(model: Any, module: str) -> bool:
    """Whether no norm stands between a module's output and the residual stream, as in Gemma 2.

    Args:
        model: with or without its head.
        module: its name in the model without its head.
    """
    base = base_of(model)
    outputs: list[Tensor] = []
    taken: list[bool] = []

    def note(_: torch.nn.Module, args: Any, output: Any) -> None:
        outputs.append(output[0] if isinstance(output, (tuple, list)) else output)

    def look(norm: torch.nn.Module, args: Any) -> None:
        x = args[0] if args else None
        if outputs and isinstance(x, Tensor) and x.shape == outputs[-1].shape:
            taken.append(torch.equal(x, outputs[-1]))

    handles = [base.get_submodule(module).register_forward_hook(note)]
    handles += [m.register_forward_pre_hook(look) for m in base.modules() if _is_norm(m)]
    try:
        _one_token(model)
    finally:
        for handle in handles:
            handle.remove()
    return not any(taken)


def _is_norm(module: torch.nn.Module) -> bool:
    weight = module._parameters.get("weight")
    return weight is not None and weight.dim() == 1


def _one_token(model: Any) -> None:
    parameter = next(model.parameters())
    ids = torch.zeros((1, 1), dtype=torch.int64, device=parameter.device)
    model(input_ids=ids, use_cache=False)


def _final_norm(model: Any, head: torch.nn.Module) -> torch.nn.Module | None:
    """The module whose output the head reads, by running the model on one token."""
    seen: list[tuple[torch.nn.Module, Tensor]] = []
    read: list[Tensor] = []

    def note(module: torch.nn.Module, args: Any, output: Any) -> None:
        if _is_norm(module) and isinstance(output, Tensor):
            seen.append((module, output))

    handles = [module.register_forward_hook(note) for module in model.modules()]
    handles.append(head.register_forward_pre_hook(lambda _, args: read.append(args[0])))
    try:
        _one_token(model)
    finally:
        for handle in handles:
            handle.remove()
    for module, output in reversed(seen):
        if read and output.shape == read[0].shape and torch.equal(output, read[0]):
            return module
    return None

"""What finetuning needs of memory, known before a coder is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import torch

from bsc.devices import product_dtype
from bsc.errors import ConfigError
from bsc.progress import format_bytes
from bsc.train.coders.coder import parameter_shapes
from bsc.train.optim import state_bytes
from bsc.train.run_config import FinetunedCoder

__all__ = ["MemoryPlan", "ModelSize", "plan_memory"]

_TOKENS_AT_ONCE = {"cpu": 8_192, "cuda": 65_536}
"""Tokens of a forward pass where memory allows: more gain nothing."""
_LIBRARIES = {"cpu": 128 << 20, "cuda": 1280 << 20}
"""What torch takes for itself at its first products, and pieces of logits in float32."""


class ModelSize(NamedTuple):
    """What the memory of a backward pass depends on."""

    width: int
    layers: int
    """Those that may run after the first splice."""
    heads: int
    """0 where attention is fused."""
    vocabulary: int
    bytes_each: int
    """Of a value."""


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on the device beside the model, by what they are for."""

    weights: int
    """Parameters and gradients of all coders, float32."""
    optimisers: int
    acting: int
    """Copies that products are taken with, of the coders that are spliced in at a time."""
    passes: int
    """Forward and backward pass of the contexts that are worked on at a time."""
    micro_contexts: int
    """Contexts that are worked on at a time."""

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.optimisers + self.acting + self.passes


def plan_memory(
    planned: Sequence[FinetunedCoder],
    sets: Sequence[Sequence[str]],
    model: ModelSize,
    *,
    context: int,
    batch_contexts: int,
    micro_tokens: int | None,
    precision: str,
    device: str,
    free: int,
) -> MemoryPlan:
    """Memory of a run, with as many contexts at a time as fit.

    Args:
        planned: the coders.
        sets: those that are spliced in together, by name.
        model: its size.
        context: tokens of a context.
        batch_contexts: contexts of a step.
        micro_tokens: tokens that are worked on at a time at most; None: as many as fit.
        precision: of a coder's products.
        device: type of it.
        free: bytes that may be used.

    Raises:
        ConfigError: it does not fit, however few contexts are worked on at a time.
    """
    shapes = [parameter_shapes(c.coder) for c in planned]
    values = [sum(prod(s) for s in own.values()) for own in shapes]
    # Lengths of rows are parameters too where they are held.
    weights = sum(2 * 4 * (v + c.coder.n_latents) for v, c in zip(values, planned, strict=True))
    weights += sum(8 * c.coder.n_latents for c in planned)  # when each latent last fired
    optimisers = sum(
        state_bytes(c.optimiser, own) + 8 * c.coder.n_latents
        for c, own in zip(planned, shapes, strict=True)
    )
    # Rounded copies, the decoder that acts, and a new gradient beside the one that it is added to.
    largest = max(map(len, sets))
    acting = largest * max(values) * (2 + 4 + 4)
    token = _token_bytes(model, context)
    token += largest * max(_coder_token_bytes(c, precision, device) for c in planned)
    hookpoints = {c.name: c.hookpoint for c in planned}
    splices = {tuple(hookpoints[name] for name in own) for own in sets}
    token += len(splices) * 5 * model.width * model.bytes_each  # what runs before each of them
    asked = min((micro_tokens or _TOKENS_AT_ONCE.get(device, 8_192)) // context, batch_contexts)
    contexts = max(1, asked)
    widest = max(c.coder.n_latents for c in planned)
    counted = 2**31 if device == "cuda" else 2**62  # its kernels count pre-activations in 32 bits

    def plan(contexts: int) -> MemoryPlan:
        passes = _LIBRARIES.get(device, _LIBRARIES["cpu"]) + contexts * context * token
        return MemoryPlan(weights, optimisers, acting, passes, contexts)

    def fits(contexts: int) -> bool:
        return plan(contexts).total <= free and contexts * context * widest < counted

    while micro_tokens is None and not fits(contexts) and contexts > 1:
        contexts //= 2
    if not fits(contexts):
        made = plan(contexts)
        fewer = ", or give a smaller --micro-tokens" if contexts > 1 else ""
        limit = f", where a pass has fewer than {counted:,} pre-activations" * (device == "cuda")
        raise ConfigError(
            f"{len(planned)} coders need {format_bytes(made.total)} of memory "
            f"({format_bytes(weights)} weights and gradients, {format_bytes(optimisers)} "
            f"optimisers, {format_bytes(acting)} acting copies, {format_bytes(made.passes)} for "
            f"{contexts} contexts of {context} tokens at a time), but {format_bytes(free)} may be "
            f"used on {device}{limit}. Finetune fewer coders at a time (--coders, several runs)"
            f"{fewer}."
        )
    return plan(contexts)


def _token_bytes(model: ModelSize, context: int) -> int:
    """Bytes of a token in the model's own passes.

    A layer keeps 17 values per channel for its backward pass, and 2.5 per head and token that is
    attended to where attention is not fused (Korthikanti et al. 2022, arXiv:2205.05198, section
    4.1). Logits and their gradient in the model's dtype, the clean probabilities in float32.
    """
    layer = int(17 * model.width + 2.5 * model.heads * context)
    logits = model.vocabulary * (3 * model.bytes_each + 4)
    return model.layers * layer * model.bytes_each + logits


def _coder_token_bytes(coder: FinetunedCoder, precision: str, device: str) -> int:
    """Bytes of a token in a coder: pre-activations, selection, entries, rows in float32.

    With batch top-k every row is as wide as the one with most, which is taken to have 4 k.
    """
    own = coder.coder
    each = product_dtype(precision, torch.device(device)).itemsize
    entries = (4 if own.select == "batch_topk" else 1) * own.k * 96
    return own.n_latents * 2 * each + entries + 4 * (4 * own.d_in + 6 * own.d_out)

"""What finetuning needs of memory, known before a coder is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

from bsc.errors import ConfigError
from bsc.finetuning.config import FinetuneConfig
from bsc.progress import format_bytes
from bsc.train.coders.coder import parameter_shapes
from bsc.train.optim import state_bytes
from bsc.train.run_config import FinetunedCoder

__all__ = ["MemoryPlan", "ModelSize", "plan_memory"]

_TOKENS_AT_ONCE = {"cpu": 8_192, "cuda": 65_536}
"""Tokens of a forward pass where memory allows: more gain nothing."""
_LIBRARIES = 128 << 20
"""What torch takes for itself at its first products, and pieces of logits in float32."""


class ModelSize(NamedTuple):
    """What the memory of a backward pass depends on."""

    width: int
    layers: int
    """Those that may run after the first splice."""
    heads: int
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
    largest_set: int,
    model: ModelSize,
    config: FinetuneConfig,
    context: int,
    device: str,
    free: int,
) -> MemoryPlan:
    """Memory of a run, with as many contexts at a time as fit.

    Args:
        planned: the coders.
        largest_set: coders that are spliced in at a time, at most.
        model: its size.
        config: of the run.
        context: tokens of a context.
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
    acting = largest_set * max(values) * (2 + 4 + 4)
    token = _token_bytes(model, context)
    token += largest_set * max(_coder_token_bytes(c, config) for c in planned)
    asked = min(config.micro_tokens or config.batch_tokens, config.batch_tokens)
    if config.micro_tokens is None:
        asked = min(asked, _TOKENS_AT_ONCE.get(device, 8_192))

    def plan(contexts: int) -> MemoryPlan:
        passes = _LIBRARIES + contexts * context * token
        return MemoryPlan(weights, optimisers, acting, passes, contexts)

    contexts = max(1, asked // context)
    while config.micro_tokens is None and plan(contexts).total > free and contexts > 1:
        contexts //= 2
    made = plan(contexts)
    if made.total > free:
        raise ConfigError(
            f"{len(planned)} coders need {format_bytes(made.total)} of memory "
            f"({format_bytes(weights)} weights and gradients, {format_bytes(optimisers)} "
            f"optimisers, {format_bytes(acting)} acting copies, {format_bytes(made.passes)} for "
            f"{contexts} contexts at a time), but {format_bytes(free)} may be used on {device}. "
            f"Finetune fewer coders at a time (--coders, several runs), or give a smaller "
            f"--micro-tokens."
        )
    return made


def _token_bytes(model: ModelSize, context: int) -> int:
    """Bytes of a token in the model's own passes.

    A layer keeps 17 values per channel for its backward pass, and 2.5 per head and token that is
    attended to where attention is not fused (Korthikanti et al. 2022, arXiv:2205.05198, section
    4.1). Logits and their gradient in the model's dtype, the clean probabilities in float32.
    """
    layer = int(17 * model.width + 2.5 * model.heads * context)
    logits = model.vocabulary * (3 * model.bytes_each + 4)
    return model.layers * layer * model.bytes_each + logits


def _coder_token_bytes(coder: FinetunedCoder, config: FinetuneConfig) -> int:
    """Bytes of a token in a coder: pre-activations, selection, entries, rows in float32."""
    own = coder.coder
    each = 2 if config.precision == "bf16" else 4
    return own.n_latents * 2 * each + own.k * 96 + 4 * (4 * own.d_in + 6 * own.d_out)

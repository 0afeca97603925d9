"""The loaded model of a capture, which turns batches of tokens into rows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from bsc.cache.capture.config import CaptureConfig
from bsc.cache.capture.plan import CapturePlan, plan_capture
from bsc.cache.model.architectures import default_hookpoints, warn_of_residual
from bsc.cache.model.attention import BY_POSITIONS, Separation, forward_inputs
from bsc.cache.model.hookpoints import RowTap, match_hookpoints
from bsc.cache.model.models import LanguageModel, load_model, resolve_model
from bsc.cache.model.separation import of_the_machine, separation_of
from bsc.cache.model.text import read_text
from bsc.cache.model.text_source import Packing
from bsc.cache.model.tokens import ContextBatch, context_batches
from bsc.cache.store.layout import TOKEN_ARRAYS, Hookpoint
from bsc.devices import pick_device
from bsc.errors import UserError
from bsc.progress import console

__all__ = [
    "NO_TEXT",
    "Source",
    "batch_contexts",
    "channel_scales",
    "context_length",
    "open_source",
    "plan_of",
]

MAX_DEFAULT_CONTEXT = 2048
BATCH_TOKENS = {"cpu": 8_192, "cuda": 65_536}
_SCALE_FLOOR = 0.01
"""Smallest scale of a channel, over the median one; codec int8."""
NO_TEXT = (
    "the text gives not one whole context of training tokens. Give more text, or a shorter "
    "--context."
)


@dataclass(frozen=True)
class Source:
    """A loaded model with everything that turns a batch of tokens into rows."""

    lm: LanguageModel
    tap: RowTap
    hookpoints: tuple[Hookpoint, ...]
    context: int
    batch: int
    """Contexts in a forward pass."""
    packing: Packing
    separation: Separation

    def rows(self, batch: ContextBatch) -> dict[str, torch.Tensor]:
        """Rows of a batch by array name, on the model's device, padding left out."""
        device = self.lm.model.device
        ids, position, real = (
            None if a is None else torch.from_numpy(np.ascontiguousarray(a)).to(device)
            for a in (batch.token_id, batch.position, batch.real)
        )
        assert ids is not None and position is not None
        inputs = forward_inputs(
            ids,
            position,
            packing=self.packing,
            separation=self.separation,
            real=real,
            dtype=self.lm.model.dtype,
        )
        rows = self.tap.rows(inputs)
        return rows if real is None else {n: r[real.reshape(-1)] for n, r in rows.items()}

    def block(self, batch: ContextBatch) -> dict[str, torch.Tensor]:
        """Rows of a batch with its token arrays."""
        block = self.rows(batch)
        for name, values in batch.rows().items():
            kind = np.dtype(TOKEN_ARRAYS[name])
            signed = values.astype(kind).view(f"i{kind.itemsize}")  # torch has no shift of unsigned
            block[f"tokens/{name}"] = torch.from_numpy(signed)
        return block


def open_source(config: CaptureConfig) -> Source:
    """Load the model of a capture and find out about it.

    Raises:
        UserError: the model, its hookpoints or the context are not as they are asked for.
    """
    resolve_model(config.model)
    device = pick_device(config.device)
    lm = load_model(
        config.model,
        revision=config.revision,
        dtype=config.dtype,
        device=device,
        random_weights=config.random_weights,
    )
    patterns = list(config.hookpoints) or list(default_hookpoints(lm.base))
    names = match_hookpoints(lm.base, patterns)
    if warning := warn_of_residual(lm.base, names):
        console.print(warning, markup=False, highlight=False)
    tap = RowTap(lm.base, names)
    context = context_length(config.context, lm.context)
    rows = _try_out(tap, context, device)
    hooks = tuple(
        Hookpoint(n, rows[f"{n}/input"].shape[1], rows[f"{n}/output"].shape[1]) for n in tap.names
    )
    separation = BY_POSITIONS
    if config.packing == "masked":
        separation = separation_of(lm, names, context)
    batch = batch_contexts(config, context, device)
    return Source(lm, tap, hooks, context, batch, config.packing, separation)


def _try_out(tap: RowTap, context: int, device: torch.device) -> dict[str, torch.Tensor]:
    """Rows of one context of full length, before anything is written."""
    ids = torch.zeros((1, context), dtype=torch.int64, device=device)
    failures = (RuntimeError, ValueError, TypeError, IndexError, AttributeError)
    try:
        return tap.try_out({"input_ids": ids})
    except failures as error:
        if isinstance(error, UserError) or of_the_machine(error):
            raise
        first_line = (str(error).strip().splitlines() or [repr(error)])[0]
        try:
            tap.rows({"input_ids": ids[:, :8]})
        except failures:
            raise UserError(
                f"--model: {type(tap.base).__name__} does not run on token ids alone "
                f"({first_line})."
            ) from error
        raise UserError(
            f"--context {context}: the model fails on a context of {context} tokens "
            f"({first_line}). Give fewer."
        ) from error


def context_length(asked: int | None, longest: int) -> int:
    """Tokens in a context, as asked for, of a model that takes up to `longest`.

    Raises:
        UserError: the model does not take what is asked for.
    """
    context = asked or min(longest, MAX_DEFAULT_CONTEXT)
    if not 1 < context <= longest:
        raise UserError(f"--context {context}: the model takes contexts of 2 to {longest} tokens.")
    return context


def plan_of(
    config: CaptureConfig, hookpoints: tuple[Hookpoint, ...], context: int, batch: int
) -> CapturePlan:
    """What a capture comes to.

    Args:
        config: what is asked for.
        hookpoints: with their widths.
        context: tokens in a context.
        batch: contexts in a forward pass.

    Raises:
        UserError: it cannot be carried out.
    """
    return plan_capture(
        hookpoints,
        tokens=config.tokens,
        held_out=config.text.held_out,
        held_out_tokens=config.held_out_tokens,
        context=context,
        batch_rows=batch * context,
        codec=config.codec,
        window=config.window,
        writers=config.world,
        ring=config.ring,
    )


def batch_contexts(config: CaptureConfig, context: int, device: torch.device) -> int:
    """Contexts in a forward pass."""
    tokens = config.batch_tokens or BATCH_TOKENS.get(device.type, 8_192)
    return max(1, tokens // context)


def channel_scales(config: CaptureConfig, source: Source) -> dict[str, NDArray[np.float32]]:
    """Root mean square of each channel over the first training batch of the text.

    The same for every writer, whichever of them begins.
    """
    batches = context_batches(
        read_text(config.text),
        source.lm.tokenizer,
        context=source.context,
        batch=source.batch,
        wanted={"train": source.batch * source.context},
        packing=config.packing,
    )
    scales = {}
    for batch in batches:
        for name, rows in source.rows(batch).items():
            values = rows.float()
            values = values[values.isfinite().all(dim=1)]
            rms = values.square().mean(dim=0).sqrt()
            # A channel that is silent in this batch may speak later, and must not then take all
            # the levels of its rows.
            floor = _SCALE_FLOOR * rms[rms > 0].median() if (rms > 0).any() else rms.new_ones(())
            rms = rms.clamp(min=float(floor))
            scales[name] = rms.cpu().numpy().astype(np.float32)
        return scales
    raise UserError(NO_TEXT)

"""What a capture is asked for, and the loaded model that turns batches of tokens into rows."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from bsc.cache.capture.plan import WINDOW
from bsc.cache.model.architectures import default_hookpoints, warn_of_residual
from bsc.cache.model.attention import Separation, document_separation, forward_inputs
from bsc.cache.model.hookpoints import RowTap, match_hookpoints
from bsc.cache.model.models import LanguageModel, load_model, resolve_model
from bsc.cache.model.text import TextSource, read_text
from bsc.cache.model.tokens import PACKINGS, ContextBatch, Packing, context_batches
from bsc.cache.store.layout import CODECS, TOKEN_ARRAYS, Codec, Hookpoint
from bsc.devices import pick_device
from bsc.errors import UserError
from bsc.progress import console

__all__ = [
    "NO_TEXT",
    "CaptureConfig",
    "Source",
    "batch_contexts",
    "channel_scales",
    "check_config",
    "open_source",
]

MAX_DEFAULT_CONTEXT = 2048
BATCH_TOKENS = {"cpu": 8_192, "cuda": 65_536}
MAX_NON_FINITE = 1e-6
"""Share of rows with a value that is not finite above which a capture is refused."""
_SCALE_FLOOR = 0.01
"""Smallest scale of a channel, over the median one; codec int8."""
NO_TEXT = (
    "the text gives not one whole context of training tokens. Give more text, or a shorter "
    "--context."
)


@dataclass(frozen=True, kw_only=True)
class CaptureConfig:
    """What to capture and where to put it."""

    model: str
    """``"demo"``, a short name, a folder, or a hub id."""
    store: Path | str
    """Folder of the store, or its address in object storage: ``s3://bucket/acts``."""
    text: TextSource
    """Where the text comes from."""
    hookpoints: tuple[str, ...] = ()
    """Patterns of module names; empty: the MLPs at the paper's depths."""
    tokens: int = 10_000_000
    """Training rows to capture; at most 1 % fewer are."""
    held_out_tokens: int | None = None
    """Rows of held-out documents to capture; None: the held-out share of `tokens`, at most 2^20."""
    context: int | None = None
    """Tokens in a context; None: the model's longest, at most 2,048."""
    batch_tokens: int | None = None
    """Tokens in a forward pass; None: 8,192 on a CPU, 65,536 on a GPU."""
    packing: Packing = "masked"
    """How contexts are filled (model/tokens.py)."""
    codec: Codec = "raw"
    """How rows are stored (store/codec.py)."""
    revision: str | None = None
    """Of the model on the hub."""
    random_weights: int | None = None
    """Seed of random weights in the place of the trained ones: a control."""
    dtype: str = "auto"
    """Of the model's arithmetic; rows are stored as bfloat16 whatever it is."""
    device: str | None = None
    """``"cpu"``, ``"cuda"``, ``"cuda:1"``; None: a GPU where there is one."""
    seed: int = 0
    """Of the order of documents and of the scatter."""
    window: int = WINDOW
    """Shards that the rows are scattered over at a time."""
    rank: int = 0
    """Which of the processes that write the store this is."""
    world: int = 1
    """Processes that write the store."""
    ring: int | None = None
    """Training shards on disk at a time; None: all of them stay."""
    max_non_finite: float = MAX_NON_FINITE
    """Share of rows with values that are not finite above which to stop."""


def check_config(config: CaptureConfig) -> None:
    """See that every field has a value that it can have.

    Raises:
        UserError: names the flag of the first that has not, and what it takes.
    """
    for flag, value in (
        ("tokens", config.tokens),
        ("context", config.context),
        ("batch-tokens", config.batch_tokens),
        ("window", config.window),
        ("world", config.world),
    ):
        if value is not None and value < 1:
            raise UserError(f"--{flag} {value}: at least 1 is needed.")
    if not 0 <= config.rank < config.world:
        raise UserError(f"--rank {config.rank}: a number from 0 to --world - 1 is needed.")
    if not 0 <= config.seed < 2**63:
        raise UserError(f"--seed {config.seed}: a number from 0 to 2^63 - 1 is needed.")
    if not 0 <= config.text.held_out < 1:
        raise UserError(f"--held-out {config.text.held_out}: a share from 0 to below 1 is needed.")
    if config.held_out_tokens and not config.text.held_out:
        raise UserError("--held-out 0 holds out no document, so --held-out-tokens has none.")
    if config.ring is not None and "://" in str(config.store):
        raise UserError("--ring: needs a file system; object storage has no bound to keep within.")
    if not 0 <= config.max_non_finite <= 1:
        raise UserError(f"--max-non-finite {config.max_non_finite}: a share from 0 to 1 is needed.")
    for flag, word, known in (
        ("packing", config.packing, PACKINGS),
        ("codec", config.codec, CODECS),
    ):
        if word not in known:
            raise UserError(f"--{flag} {word}: expected {', '.join(known)}.")


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
            ids, position, packing=self.packing, separation=self.separation, real=real,
            dtype=self.lm.model.dtype,
        )  # fmt: skip
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
        config.model, revision=config.revision, dtype=config.dtype, device=device,
        random_weights=config.random_weights,
    )  # fmt: skip
    patterns = list(config.hookpoints) or list(default_hookpoints(lm.base))
    names = match_hookpoints(lm.base, patterns)
    if warning := warn_of_residual(lm.base, names):
        console.print(warning, markup=False, highlight=False)
    tap = RowTap(lm.base, names)
    context = config.context or min(lm.context, MAX_DEFAULT_CONTEXT)
    if not 1 < context <= lm.context:
        raise UserError(
            f"--context {context}: the model takes contexts of 2 to {lm.context} tokens."
        )
    rows = tap.rows({"input_ids": torch.zeros((1, 8), dtype=torch.int64, device=device)})
    hooks = tuple(
        Hookpoint(n, rows[f"{n}/input"].shape[1], rows[f"{n}/output"].shape[1]) for n in tap.names
    )
    separation: Separation = "positions"
    if config.packing == "masked":
        vocabulary = int(lm.model.get_input_embeddings().weight.shape[0])
        separation = document_separation(
            tap.rows, vocabulary=vocabulary, dtype=lm.model.dtype, device=device
        )
    batch = batch_contexts(config, context, device)
    return Source(lm, tap, hooks, context, batch, config.packing, separation)


def batch_contexts(config: CaptureConfig, context: int, device: torch.device) -> int:
    """Contexts in a forward pass."""
    tokens = config.batch_tokens or BATCH_TOKENS.get(device.type, 8_192)
    return max(1, tokens // context)


def channel_scales(config: CaptureConfig, source: Source) -> dict[str, NDArray[np.float32]]:
    """Root mean square of each channel over the first training batch of the text.

    The same for every writer, whichever of them begins.
    """
    batches = context_batches(
        read_text(config.text), source.lm.tokenizer, context=source.context, batch=source.batch,
        wanted={"train": source.batch * source.context}, packing=config.packing,
    )  # fmt: skip
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

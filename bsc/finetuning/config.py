"""What to finetune, as a user asks for it. Imports neither torch nor zarr."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator

from bsc.config import Config
from bsc.counts import parse_count
from bsc.options import MACHINE, STEERING, option
from bsc.train.config import Decay, Optimiser, parse_lr, plain_name

__all__ = ["BATCH_TOKENS", "FinetuneConfig", "Loss"]

BATCH_TOKENS = 512
"""Tokens in a step where none are given and a context is not longer."""

Loss = Literal["kl", "ce", "kl+fvu"]
_WHAT, _HOW = "What is finetuned", "Finetuning"


class FinetuneConfig(Config):
    """A run of finetuned coders."""

    name: str = option("finetuned", "Name of the new run.", _WHAT)
    runs: Path | None = option(None, "Folder of runs.", _WHAT, shown="the one that RUN is in")
    coders: tuple[str, ...] = option(
        (), "Coders, by name or pattern; several times.", _WHAT, shown="all", metavar="GLOB"
    )
    values: Literal["kept", "removed"] = option(
        "kept",
        "kept: coders as they are. removed: of continuous coders, finetuned as binary ones; 1 "
        "where a latent fires, with its mean value in the decoder row. A control.",
        _WHAT,
    )
    together: bool = option(
        False,
        "Whether coders that are alike but for the hookpoint are spliced in at once, and learn to "
        "work together; else each is spliced in alone.",
        _WHAT,
        flag="--together/--apart",
    )
    loss: Loss = option(
        "kl+fvu",
        "kl: divergence from the model as it is. ce: cross-entropy of the next token. kl+fvu: KL "
        "and reconstruction.",
        _HOW,
    )
    fvu_weight: float = option(
        3.0, "How much more than KL reconstruction weighs in kl+fvu.", _HOW, ge=0
    )
    """1: both weigh the same (Karvonen 2025)."""
    tokens: int = option(10_000_000, "Tokens to finetune on.", _HOW, ge=1, parser=parse_count)
    """More than the text has are more passes over it."""
    batch_tokens: int | None = option(
        None,
        "Tokens in a step.",
        _HOW,
        ge=2,
        le=2**24,
        shown="512, or a context where that is longer",
        parser=parse_count,
    )
    micro_tokens: int | None = option(
        None, "Tokens worked on at a time.", _HOW, ge=2, shown="what memory allows",
        parser=parse_count,
    )  # fmt: skip
    """A step adds up the gradients of its batch. Bounds the memory, changes nothing but
    rounding."""
    optimiser: Optimiser = option("adam", "adam, signum, signum_classic, muon.", _HOW)
    lr: Annotated[float, Field(gt=0)] | Literal["paper"] | None = option(
        None,
        "Learning rate, or 'paper'.",
        _HOW,
        shown="by optimiser and code",
        parser=parse_lr,
        metavar="FLOAT",
    )
    """paper: 1e-3 with 50 steps of warm-up, which the authors took for Adam, in the units of the
    module: `normalise = "none"` goes with it."""
    beta1: float | None = option(
        None,
        "Share of the gradients before in the mean that Adam goes by.",
        _HOW,
        ge=0,
        lt=1,
        shown="0.7; 0.9 for the paper's learning rate",
    )
    warmup: float | None = option(
        None,
        "Share of the steps over which the learning rate rises.",
        _HOW,
        ge=0,
        le=1,
        shown="0.05; 0 for signum",
    )
    decay: Decay | None = option(
        None, "How it falls afterwards: linear, none.", _HOW, shown="linear; none for signum"
    )
    clip_norm: float | None = option(
        None, "Length that gradients of a coder are cut to.", _HOW, gt=0, shown="not cut"
    )
    normalise: Literal["rms", "none"] = option(
        "rms",
        "Units that weights are trained in. rms: rows have a root mean square of 1, so that step "
        "sizes mean the same for every module. none: rows as the module gives them.",
        _HOW,
    )
    precision: Literal["bf16", "fp32"] = option(
        "bf16", "Precision of a coder's products: bf16, fp32.", _HOW
    )
    dead_after: int = option(
        1_000_000, "Tokens without firing that make a latent dead.", _HOW, ge=1, parser=parse_count
    )
    log_every: int = option(10, "Steps between two lines of metrics.jsonl.", STEERING, ge=1)
    checkpoint_every: int | None = option(
        None, "Steps between checkpoints.", STEERING, ge=1, shown="every ten minutes"
    )
    keep_checkpoint: bool = option(
        True,
        "Whether the last one is kept when the run has ended.",
        STEERING,
        flag="--keep-checkpoint/--no-keep-checkpoint",
    )
    tensorboard: bool = option(
        False, "Write TensorBoard files too.", STEERING, flag="--tensorboard/--no-tensorboard"
    )
    wandb: str | None = option(None, "Project at Weights & Biases.", STEERING)
    device: str | None = option(
        None, "cpu, cuda or cuda:1.", MACHINE, shown="a GPU where there is one"
    )

    _name = field_validator("name")(plain_name)

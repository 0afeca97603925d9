"""Continuous coders whose values are removed before they are finetuned: a control.

Where a latent fires it is 1, and its decoder row is multiplied by the mean value that it had where
it fired. Such a coder is binary in every respect but how it was trained.
"""

from __future__ import annotations

import math
from collections.abc import Collection

import torch

from bsc.cache.store.store import ActivationStore
from bsc.eval.passes.controls import calibrate
from bsc.train.coders.coder import SparseCoder
from bsc.train.coders.config import CoderConfig

__all__ = ["config_without_values", "without_values"]

_THRESHOLD = 1e-6
"""Pre-activation above which it fires: the continuous coder's 0, as a binary coder can have it."""


def config_without_values(config: CoderConfig) -> CoderConfig:
    """The maths of a continuous coder without its values."""
    fields = config.model_dump() | {
        "code": "binary",
        "threshold": "fixed",
        "surrogate": "sigmoid",
        "temperature": 2.0,
        "decoder_norm": "free",
        "amplitude": "none",
    }
    return CoderConfig.model_validate(fields)


def without_values(
    coder: SparseCoder, store: ActivationStore, hookpoint: str, *, without_tokens: Collection[int]
) -> SparseCoder:
    """A continuous coder without its values.

    Args:
        coder: as it was trained.
        store: on whose training rows the mean values are measured.
        hookpoint: of the coder.
        without_tokens: token ids whose rows it was trained without.
    """
    mean = calibrate(coder, store, hookpoint, without_tokens=without_tokens).mean_value
    tensors = dict(coder.tensors) | {
        "W_dec": coder.W_dec * mean.unsqueeze(1),
        "log_threshold": torch.full((coder.config.n_latents,), math.log(_THRESHOLD)),
    }
    return SparseCoder(config_without_values(coder.config), tensors, about=coder.about)

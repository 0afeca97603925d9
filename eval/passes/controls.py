"""What is taken from a coder's code to see what it is worth: values, their precision, latents.

Edits of a code, each a function from Code to Code. Two of them need numbers that are measured once
on *training* rows, so that nothing is fitted to the rows that are evaluated:

* binarised: every firing of a continuous latent takes the latent's mean value when it fires. What
  is lost is magnitudes alone; a binary coder that was trained has other latents besides.
* quantised: values are rounded to a step, so that a continuous code has a size in bits at all.
  Steps are such that each latent adds the same error, and all of them together 1 % to the squared
  error of the coder (a uniform quantiser of step s adds s^2 / 12 to a value; times |W_dec row|^2).

Source: uniform scalar quantisation at high rate, Gray and Neuhoff 1998, "Quantization", IEEE
Transactions on Information Theory 44 (6), section II; the same error for every latent is what
minimises rate at a given distortion there.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

import torch
from torch import Tensor

from bsc.cache.store.ring import first_kept
from bsc.cache.store.store import ActivationStore
from bsc.eval.passes.batches import row_batches
from bsc.eval.passes.sums import add_to
from bsc.train.coders.coder import Code, SparseCoder

__all__ = ["TOLERANCE", "Calibration", "binarised", "calibrate", "quantised", "without_latents"]

TOLERANCE = 0.01
"""Share of the squared error that quantising the values may add."""
CALIBRATION_ROWS = 65_536


class Calibration(NamedTuple):
    """Numbers of one coder, measured on training rows."""

    mean_value: Tensor
    """(F,) mean value of a latent where it fires; the mean of all latents where it never did."""
    step: Tensor
    """(F,) quantisation step of a latent's values; 0 for a decoder row of zeros."""
    rows: int
    """Rows that it was measured on."""


def _first_training_row(store: ActivationStore, hook: str) -> int:
    """First training row that is there: the first shards of a ring are gone."""
    if store.ring is None:
        return 0
    spec = store.train.spec(f"{hook}/input")
    return first_kept(store.folder, spec, store.train.shards) * store.train.grid.shard_rows


@torch.inference_mode()
def calibrate(
    coder: SparseCoder,
    store: ActivationStore,
    hookpoint: str,
    *,
    without_tokens: Collection[int],
    max_rows: int = CALIBRATION_ROWS,
) -> Calibration:
    """Mean values and quantisation steps of a coder's latents.

    Args:
        coder: on the device where to compute.
        store: whose training rows they are; of a ring the first that are there.
        hookpoint: module whose rows they are.
        without_tokens: token ids whose rows are left out, as the run left them out.
        max_rows: rows to read; shards of a store hold rows at random, so the first are a sample.
    """
    device, n_latents = coder.W_enc.device, coder.config.n_latents
    total = torch.zeros(n_latents, dtype=torch.float64, device=device)
    count = torch.zeros_like(total)
    error = torch.zeros((), dtype=torch.float64, device=device)
    rows, first = 0, _first_training_row(store, hookpoint)
    for batch in row_batches(
        store.train, hookpoint, coder.config.n_latents, without_tokens, first=first
    ):
        x, y = (side.to(device, coder.dtype) for side in (batch.side(coder), batch.y))
        code = coder.encode(x)
        error += (y - coder.decode(code, x)).square().sum(dtype=torch.float64)
        latent, value = code.latent.flatten(), code.value.flatten().double()
        add_to(total, latent, value)
        add_to(count, latent, (value != 0).double())
        rows += len(x)
        if rows >= max_rows:
            break
    continuous = slice(0, coder.config.first_binary)
    overall = total[continuous].sum() / count[continuous].sum().clamp(min=1)
    mean = torch.where(count > 0, total / count.clamp(min=1), overall)
    # step^2 |W|^2 / 12 per firing, the same for all, adds up to TOLERANCE of the error.
    per_firing = TOLERANCE * float(error) / max(1.0, float(count[continuous].sum()))
    norm = coder.W_dec.norm(dim=1)
    step = torch.where(norm > 0, (12 * per_firing) ** 0.5 / norm, torch.zeros_like(norm))
    return Calibration(mean.to(coder.dtype), step, rows)


def binarised(coder: SparseCoder, calibration: Calibration, code: Code) -> Code:
    """The code with a continuous latent's mean in the place of its value, where it fires."""
    mean = calibration.mean_value[code.latent].to(code.value.dtype)
    change = (code.value != 0) & (code.latent < coder.config.first_binary)
    return code._replace(value=torch.where(change, mean, code.value))


def quantised(coder: SparseCoder, calibration: Calibration, code: Code) -> Code:
    """The code with a continuous latent's value rounded to the middle of its step."""
    step = calibration.step[code.latent].to(code.value.dtype)
    change = (code.value != 0) & (code.latent < coder.config.first_binary) & (step > 0)
    rounded = ((code.value / step).floor() + 0.5) * step
    return code._replace(value=torch.where(change, rounded, code.value))


def without_latents(code: Code, off: Tensor) -> Code:
    """The code with some latents set to 0; no other latent comes in their place.

    Args:
        code: of a coder with F latents.
        off: (F,) bool, the latents to set to 0.
    """
    return code._replace(value=code.value.masked_fill(off[code.latent], 0))

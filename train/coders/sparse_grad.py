"""Sparse steps of a coder with gradients: what `CoderModule` is made of.

Gradients of a code reach selected latents alone, so none of them needs a matrix (N, F): they are
sums over the entries of a latent or of a row (kernels.py), as in training. Shape letters: N rows,
F latents, d width, k selected per row, M = N k entries.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from bsc.train.coders import kernels, surrogates
from bsc.train.coders.kernels import Entries, TransposedCode

__all__ = ["Selected", "decoded", "of_latents", "step", "with_gradient"]


class Selected:
    """The selected latents of some rows, and the order that sums over a latent need."""

    def __init__(self, latent_Nk: Tensor, n_latents: int) -> None:
        """Take latents (N, k), int64, none twice in a row, of F."""
        self.latent, self._n = latent_Nk, n_latents

    @cached_property
    def entries(self) -> Entries:
        """Row by row."""
        return Entries.of(self.latent)

    @cached_property
    def by_latent(self) -> TransposedCode:
        """Latent by latent; sorted once for all gradients."""
        return kernels.transpose(self.entries, self._n)

    def sums(self, weight_Nk: Tensor, rows_Nd: Tensor) -> Tensor:
        """sum over the entries of a latent of weight * row, (F, d), in the dtype of the rows."""
        weight_M = weight_Nk.flatten()[self.by_latent.order].to(rows_Nd.dtype)
        return kernels.latent_sums(self.by_latent, weight_M, rows_Nd)


class _WithGradient(torch.autograd.Function):
    """<row, weight of a latent> of selected latents, whose values are known already."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, weight: Tensor, value_Nk: Tensor, dtype: torch.dtype,
        selected: Selected,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(rows, weight)
        ctx.how = dtype, selected
        return value_Nk

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        rows, weight = ctx.saved_tensors
        dtype, selected = ctx.how
        g_rows = g_weight = None
        if ctx.needs_input_grad[0]:
            table, code = weight.to(dtype), grads[0].flatten().to(dtype)
            g_rows = kernels.decode(selected.entries, code, table).to(rows.dtype)
        if ctx.needs_input_grad[1]:
            g_weight = selected.sums(grads[0], rows.to(dtype)).to(weight.dtype)
        return g_rows, g_weight, None, None, None


class _OfLatents(torch.autograd.Function):
    """Values of selected latents from those of all."""

    @staticmethod
    def forward(ctx: Any, vector_F: Tensor, selected: Selected) -> Tensor:
        ctx.selected = selected
        return vector_F[selected.latent]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        ones = grads[0].new_ones((len(grads[0]), 1))
        return ctx.selected.sums(grads[0], ones).squeeze(1), None


class _Decoded(torch.autograd.Function):
    """sum over a row's entries of value * W_dec[latent]."""

    @staticmethod
    def forward(
        ctx: Any, value_Nk: Tensor, table_Fd: Tensor, dtype: torch.dtype, selected: Selected
    ) -> Tensor:
        ctx.save_for_backward(value_Nk, table_Fd)
        ctx.how = dtype, selected
        code = value_Nk.flatten().to(dtype)
        return kernels.decode(selected.entries, code, table_Fd.to(dtype)).to(table_Fd.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        value_Nk, table_Fd = ctx.saved_tensors
        dtype, selected = ctx.how
        g_value = g_table = None
        if ctx.needs_input_grad[0]:
            exact = kernels.dots_in_float32(grads[0].device, dtype)
            rows, table = (t if exact else t.to(dtype) for t in (grads[0].contiguous(), table_Fd))
            dot = kernels.decoder_dot(rows, table, selected.by_latent).to(value_Nk.dtype)
            g_value = torch.empty_like(dot).index_copy_(0, selected.by_latent.order, dot)
            g_value = g_value.view_as(value_Nk)
        if ctx.needs_input_grad[1]:
            g_table = selected.sums(value_Nk, grads[0].to(dtype)).to(table_Fd.dtype)
        return g_value, g_table, None, None


class _Step(torch.autograd.Function):
    """1 where a margin is above 0 (or everywhere), with the gradient of a surrogate.

    Gradients are those of training (docs/coders.md), to pre-activations and to log thresholds.
    """

    @staticmethod
    def forward(
        ctx: Any, margin: Tensor, log_threshold: Tensor, shift: Tensor, surrogate: str | None,
        temperature: float, always_on: bool,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(margin, log_threshold, shift)
        ctx.how = surrogate, temperature
        return torch.ones_like(margin) if always_on else (margin > 0).to(margin.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        margin, log_threshold, shift = ctx.saved_tensors
        surrogate, temperature = ctx.how
        none = (None,) * 4
        if surrogate is None:
            return (None, None, *none)
        g = surrogates.SURROGATES[surrogate](grads[0], margin + shift, temperature)
        factor = surrogates.threshold_factor(surrogate, log_threshold.exp(), temperature)
        return (g, g * factor, *none)


def with_gradient(
    rows: Tensor, weight: Tensor, value_Nk: Tensor, dtype: torch.dtype, selected: Selected
) -> Tensor:
    """The products of rows and selected latents' weights, differentiable.

    Args:
        rows: (N, d).
        weight: (F, d).
        value_Nk: the products, (N, k).
        dtype: of products in the backward pass.
        selected: the latents.
    """
    made: Tensor = _WithGradient.apply(rows, weight, value_Nk, dtype, selected)  # type: ignore[no-untyped-call] # torch leaves it untyped
    return made


def of_latents(vector_F: Tensor, selected: Selected) -> Tensor:
    """vector[latent], (N, k), differentiable."""
    made: Tensor = _OfLatents.apply(vector_F, selected)  # type: ignore[no-untyped-call] # torch leaves it untyped
    return made


def decoded(value_Nk: Tensor, table_Fd: Tensor, dtype: torch.dtype, selected: Selected) -> Tensor:
    """sum over a row's latents of value * table[latent], (N, d), products in `dtype`."""
    made: Tensor = _Decoded.apply(value_Nk, table_Fd, dtype, selected)  # type: ignore[no-untyped-call] # torch leaves it untyped
    return made


def step(
    margin: Tensor, log_threshold: Tensor, shift: Tensor, surrogate: str | None,
    temperature: float, always_on: bool,
) -> Tensor:  # fmt: skip
    """Codes of binary latents, (N, k): 1 where a margin is above 0, or everywhere.

    Args:
        margin: pre - theta; the gradient to theta goes through `log_threshold` alone.
        log_threshold: of each of these latents.
        shift: added to the margin that the surrogate is taken at.
        surrogate: one of `surrogates.SURROGATES`; None: no gradient.
        temperature: of the surrogate.
        always_on: whether a selected latent is 1 whatever its margin.
    """
    made: Tensor = _Step.apply(margin, log_threshold, shift, surrogate, temperature, always_on)  # type: ignore[no-untyped-call] # torch leaves it untyped
    return made

"""Passes over all weights of a coder, and over all rows of a batch: no products, but much memory.

Each is bound by memory. As written each runs one operation after the other, which on a CPU is done
for some latents at a time, so that their weights stay in a cache; `torch.compile` makes one loop of
each, that reads and writes every value once. Both are tested to give the same within rounding.

Shape letters: N rows, F latents (or some of them), d width.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["EAGER", "Passes", "blocks", "compiled_passes"]

_BLOCK = 1 << 19
"""Weights of a matrix that are passed over at a time on a CPU: 2 MiB of them in float32."""


def blocks(weights_Fd: Tensor) -> list[slice]:
    """Latents passed over together: as many as a cache holds the weights of; on a GPU all.

    >>> blocks(torch.zeros(5, 1 << 18))
    [slice(0, 2, None), slice(2, 4, None), slice(4, 6, None)]
    """
    if torch.compiler.is_compiling() or weights_Fd.device.type != "cpu":
        return [slice(None)]
    n_latents, width = weights_Fd.shape
    size = max(1, _BLOCK // width)
    return [slice(i, i + size) for i in range(0, n_latents, size)]


def round_encoder(weight_Fd: Tensor, bias_F: Tensor, origin_d: Tensor, out_Fd: Tensor) -> Tensor:
    """The encoder as products take it, into `out`; its biases for rows that are centred, (F,).

    Args:
        weight_Fd: the encoder, float32.
        bias_F: its biases.
        origin_d: what is added to a centred row to give the row that the encoder reads.
        out_Fd: gets the rounded weights.
    """
    if torch.compiler.is_compiling():  # addmv would be a pass of its own
        out_Fd.copy_(weight_Fd)
        return bias_F + (weight_Fd * origin_d).sum(1)
    folded = torch.empty_like(bias_F)
    for some in blocks(weight_Fd):
        out_Fd[some] = weight_Fd[some]
        torch.addmv(bias_F[some], weight_Fd[some], origin_d, out=folded[some])
    return folded


def round_decoder(w_Fd: Tensor, amplitude_F1: Tensor, out_Fd: Tensor) -> None:
    """Decoder rows of length 1 as products take them, of the length of their amplitudes.

    Args:
        w_Fd: the parameter W_dec, float32, rows of length 1.
        amplitude_F1: lengths that the rows get.
        out_Fd: gets the rounded rows.
    """
    for some in blocks(w_Fd):
        out_Fd[some] = w_Fd[some] * amplitude_F1[some]


def encoder_gradient(
    sums_Fd: Tensor | None, g_bias_F: Tensor, origin_d: Tensor, out_Fd: Tensor
) -> None:
    """Gradient of the encoder from that to centred rows: sums + g_bias (x) origin, into `out`.

    Args:
        sums_Fd: gradient to centred rows; None: it stands in `out`.
        g_bias_F: gradient to the biases.
        origin_d: what is added to a centred row to give the row that the encoder reads.
        out_Fd: gets the gradient, float32.
    """
    for some in blocks(out_Fd):
        if sums_Fd is not None:
            out_Fd[some] = sums_Fd[some]
        out_Fd[some].addr_(g_bias_F[some], origin_d)


def unit_decoder_gradient(
    sums_Fd: Tensor | None,
    w_Fd: Tensor,
    amplitude_F1: Tensor | None,
    along_F1: Tensor,
    out_Fd: Tensor,
) -> None:
    """Gradient of unit rows W from that of a W: the part across the rows, into `out`.

    sums * a - W * along, since `along` is <gradient of a row that acts, that row> = a <sums, W>.

    Args:
        sums_Fd: gradient of the rows that act; None: it stands in `out`.
        w_Fd: the parameter W_dec, rows of length 1.
        amplitude_F1: a; None: 1.
        along_F1: <gradient of an acting row, the row>.
        out_Fd: gets the gradient, float32.
    """
    for some in blocks(w_Fd):
        if sums_Fd is not None:
            out_Fd[some] = sums_Fd[some]
        if amplitude_F1 is not None:
            out_Fd[some] *= amplitude_F1[some]
        out_Fd[some].addcmul_(w_Fd[some], along_F1[some], value=-1)


def unit_rows(w_Fd: Tensor) -> Tensor:
    """Divide every row by its length, in place; the lengths, (F, 1)."""
    lengths = w_Fd.new_empty((len(w_Fd), 1))
    for some in blocks(w_Fd):
        lengths[some] = w_Fd[some].norm(dim=1, keepdim=True)
        w_Fd[some] /= lengths[some]
    return lengths


def row_errors(
    decoded_Nd: Tensor, target_Nd: Tensor, factor: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """decoded - target, that times `factor`, and the latter rounded to the dtype of `decoded`.

    The factor is a scalar tensor: for every number torch.compile would compile again.
    """
    error = decoded_Nd.to(target_Nd.dtype) - target_Nd
    gradient = error * factor
    return error, gradient, gradient.to(decoded_Nd.dtype)


class Passes(NamedTuple):
    """The passes of this module, as written or compiled."""

    round_encoder: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    round_decoder: Callable[[Tensor, Tensor, Tensor], None]
    encoder_gradient: Callable[[Tensor | None, Tensor, Tensor, Tensor], None]
    unit_decoder_gradient: Callable[[Tensor | None, Tensor, Tensor | None, Tensor, Tensor], None]
    unit_rows: Callable[[Tensor], Tensor]
    row_errors: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


EAGER = Passes(
    round_encoder, round_decoder, encoder_gradient, unit_decoder_gradient, unit_rows, row_errors
)


@cache
def compiled_passes() -> Passes:
    """All of them compiled at their first call, which takes some seconds each.

    Needs a C++ compiler.
    """
    return Passes(
        torch.compile(round_encoder, dynamic=True),
        torch.compile(round_decoder, dynamic=True),
        torch.compile(encoder_gradient, dynamic=True),
        torch.compile(unit_decoder_gradient, dynamic=True),
        torch.compile(unit_rows, dynamic=True),
        torch.compile(row_errors, dynamic=True),
    )

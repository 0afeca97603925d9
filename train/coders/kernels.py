"""The operations that a coder's time goes into, each a named function with its cost.

Shape letters: N rows, F latents, d width, k selected latents per row, M = N k entries. Costs are
per coder. None of them makes anything of size N x k x d.

The sparse ones are written on `embedding_bag`: a bag is a weighted sum of rows of a table, so
decoding is a bag over the decoder's rows, and the gradient of the decoder (and of the encoder) is a
bag over the batch's rows, with the code transposed. In bfloat16 a bag sums in float32 and rounds
once. What was tried and lost is in benchmarks/records/train_*.md.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

__all__ = [
    "Entries",
    "TransposedCode",
    "bytes_by_pieces",
    "compiled_decoder_dot",
    "decode",
    "decoder_dot",
    "decoder_dot_by_pieces",
    "latent_sums",
    "latent_sums_by_pieces",
    "pre_activations",
    "transpose",
]

_VALUES_AT_ONCE = 1 << 26
"""Values that `decoder_dot_by_pieces` gathers at a time."""
_LONGEST = 512
"""Entries of a bag on a GPU."""


class Entries(NamedTuple):
    """Selected (row, latent) pairs of a batch, row by row."""

    latent: Tensor
    """(M,) int32, no latent twice in a row."""
    row: Tensor
    """(M,) int32, ascending."""
    offsets: Tensor
    """(N,) int32: where the entries of each row begin."""

    @classmethod
    def of(cls, index_Nk: Tensor) -> Entries:
        """Entries of a selection with the same number of latents in every row."""
        n, k = index_Nk.shape
        offsets = torch.arange(0, n * k, k, dtype=torch.int32, device=index_Nk.device)
        rows = torch.arange(n, dtype=torch.int32, device=index_Nk.device)
        return cls(index_Nk.reshape(-1).int(), rows.repeat_interleave(k), offsets)


def pre_activations(x_Nd: Tensor, weight_Fd: Tensor, out_NF: Tensor) -> Tensor:
    """x W^T into `out_NF`. 2 N F d FLOPs; reads (N + F) d values, writes N F.

    Into memory that is there already: fresh memory costs a third more on a CPU.
    """
    return torch.mm(x_Nd, weight_Fd.T, out=out_NF)


def decode(entries: Entries, code_M: Tensor, table_Fd: Tensor) -> Tensor:
    """sum over a row's entries of code * table[latent], (N, d).

    2 M d FLOPs; reads M rows of the table, writes N.
    """
    return embedding_bag(
        entries.latent, table_Fd, entries.offsets, mode="sum", per_sample_weights=code_M
    )


class TransposedCode(NamedTuple):
    """The entries of a batch ordered by latent, for sums over the rows of each latent."""

    order: Tensor
    """(M,) int64: positions among the entries, stably sorted by latent."""
    latent: Tensor
    """(M,) int32: the latent of each, ascending."""
    row: Tensor
    """(M,) int32: the row of each."""
    offsets: Tensor
    """(F,) int32: where those of each latent begin; an unselected latent has none."""


def transpose(entries: Entries, n_latents: int) -> TransposedCode:
    """Order the entries by latent. One sort of M int32 serves every gradient."""
    latent, order = entries.latent.sort(stable=True)
    every = torch.arange(n_latents, dtype=torch.int32, device=latent.device)
    offsets = torch.searchsorted(latent, every, out_int32=True)
    return TransposedCode(order, latent, entries.row[order], offsets)


def decoder_dot(grad_Nd: Tensor, table_Fd: Tensor, code: TransposedCode) -> Tensor:
    """<grad[row], table[latent]> by latent, (M,): the gradient of a decoded value to its code.

    2 M d FLOPs; reads F rows of the table and M gradients: a row of the table serves all entries of
    its latent, and all gradients fit into a cache where the table does not. On a CPU in float32 as
    fast as in bfloat16 or faster, and 1.4 to 1.8 times as fast as row by row.
    """
    if _by_pieces(table_Fd.device, table_Fd.dtype):
        return decoder_dot_by_pieces(grad_Nd, table_Fd, code)
    out: Tensor = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        table_Fd, grad_Nd, code.row, code.offsets, code.latent, 0, -1
    )
    return out


@cache
def _by_pieces(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `decoder_dot` has no kernel of torch: in bfloat16 on CUDA before torch 2.13.

    https://github.com/pytorch/pytorch/issues/185808. No GPU has run either yet.
    """
    old = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13)
    return device.type == "cuda" and dtype == torch.bfloat16 and old


def decoder_dot_by_pieces(
    grad_Nd: Tensor, table_Fd: Tensor, code: TransposedCode, values_at_once: int = _VALUES_AT_ONCE
) -> Tensor:
    """`decoder_dot` as gather, multiply and sum, some entries at a time.

    Products in the dtype given, sums in float32 or better. Makes pieces of size
    `values_at_once`, twice: 256 MiB each in bfloat16 widened to float32.
    """
    wide = torch.promote_types(table_Fd.dtype, torch.float32)
    size = max(1, values_at_once // table_Fd.shape[1])
    out = table_Fd.new_empty(len(code.latent))
    for start in range(0, len(out), size):
        latent, row = (t[start : start + size] for t in (code.latent, code.row))
        products = table_Fd[latent].to(wide).mul_(grad_Nd[row])
        out[start : start + size] = products.sum(1)
    return out


@cache
def compiled_decoder_dot() -> Callable[[Tensor, Tensor, TransposedCode], Tensor]:
    """`decoder_dot` as torch.compile makes it: one loop that gathers, multiplies and sums.

    Products in the dtype given, sums in float32 (float64 for float64). Needs a C++ compiler, and
    some ten seconds at its first call.
    """

    def dot(grad_Nd: Tensor, table_Fd: Tensor, latent: Tensor, row: Tensor) -> Tensor:
        wide = torch.promote_types(table_Fd.dtype, torch.float32)
        products = table_Fd[latent].to(wide) * grad_Nd[row].to(wide)
        return products.sum(1).to(table_Fd.dtype)

    compiled = torch.compile(dot, dynamic=True)

    def decoder_dot(grad_Nd: Tensor, table_Fd: Tensor, code: TransposedCode) -> Tensor:
        out: Tensor = compiled(grad_Nd, table_Fd, code.latent, code.row)
        return out

    return decoder_dot


def latent_sums(code: TransposedCode, weight_M: Tensor, rows_Nd: Tensor) -> Tensor:
    """sum over a latent's entries of weight * rows[row], (F, d); 0 where it was not selected.

    The weights are in the order of `code`: by latent.

    2 M d FLOPs; reads M rows, writes F. On a CPU about 14 times as fast as `index_add`,
    deterministic and without atomics.
    """
    if rows_Nd.device.type == "cuda":
        return latent_sums_by_pieces(code, weight_M, rows_Nd)
    return embedding_bag(code.row, rows_Nd, code.offsets, mode="sum", per_sample_weights=weight_M)


def latent_sums_by_pieces(
    code: TransposedCode, weight_M: Tensor, rows_Nd: Tensor, longest: int = _LONGEST
) -> Tensor:
    """`latent_sums` for a GPU, where one warp walks a bag: none has more than `longest` entries.

    Else the time of a step would be that of the latent that fires most. The entries of a latent are
    divided into pieces, whose sums are summed. There are F + M / longest pieces at most, so nothing
    has to be known on the host. No GPU has timed it yet.
    """
    m, n_latents = len(code.row), len(code.offsets)
    counts = torch.diff(code.offsets, append=code.offsets.new_full((1,), m))
    pieces = (counts + longest - 1) // longest
    ends = pieces.cumsum(0)
    number = torch.arange(n_latents + m // longest, device=ends.device)
    latent = torch.searchsorted(ends, number, right=True)  # n_latents for pieces that are none
    of = latent.clamp(max=n_latents - 1)
    starts = code.offsets[of] + (number - (ends - pieces)[of]) * longest
    starts = torch.where(latent < n_latents, starts, m).int()
    sums = embedding_bag(code.row, rows_Nd, starts, mode="sum", per_sample_weights=weight_M)
    return embedding_bag(number.int(), sums, (ends - pieces).int(), mode="sum")


def bytes_by_pieces(n_latents: int, width: int, entries: int, dtype: torch.dtype) -> int:
    """Bytes that a GPU needs for the pieces of `latent_sums` or of `decoder_dot`, beside results.

    Args:
        n_latents: F.
        width: d of the rows that are summed.
        entries: M.
        dtype: of the products.
    """
    numbers = 8 * 8  # of a piece: int64
    sums = (n_latents + entries // _LONGEST) * (width * dtype.itemsize + numbers)
    if not _by_pieces(torch.device("cuda"), dtype):
        return sums
    gathered = min(max(_VALUES_AT_ONCE, width), entries * width)
    return max(sums, gathered * (4 + 3 * dtype.itemsize))

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
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

__all__ = [
    "MOST_ENTRIES",
    "Entries",
    "Pieces",
    "TransposedCode",
    "bytes_by_pieces",
    "compiled_decoder_dot",
    "decode",
    "decoder_dot",
    "dots_in_float32",
    "latent_sums",
    "latent_sums_by_pieces",
    "mark",
    "pieces_of",
    "pre_activations",
    "transpose",
]

_LONGEST = 512
"""Entries of a bag on a GPU."""
MOST_ENTRIES = 1 << 26
"""Entries of a pass on CUDA: `decoder_dot` counts 32 threads for each, in 32 bits."""


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
        return cls(index_Nk.reshape(-1).int(), rows.unsqueeze(1).expand(n, k).reshape(-1), offsets)


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


class Pieces(NamedTuple):
    """Where pieces of a transposed code begin, of bounded length, for `latent_sums` on a GPU."""

    starts: Tensor
    """(P,) int32: where the entries of each piece begin. The last ones are none: they are empty."""
    number: Tensor
    """(P,) int32: 0 to P - 1."""
    offsets: Tensor
    """(F + P / longest + 1,) int32: where the pieces of each latent begin, and afterwards
    those that are none, divided like the others."""


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
    pieces: Pieces | None = None
    """For a GPU alone."""


def transpose(entries: Entries, n_latents: int) -> TransposedCode:
    """Order the entries by latent. One sort of M int32 serves every gradient."""
    latent, order = entries.latent.sort(stable=True)
    every = torch.arange(n_latents, dtype=torch.int32, device=latent.device)
    offsets = torch.searchsorted(latent, every, out_int32=True)
    pieces = pieces_of(offsets, len(latent)) if latent.device.type == "cuda" else None
    return TransposedCode(order, latent, entries.row.index_select(0, order), offsets, pieces)


def pieces_of(offsets: Tensor, entries: int, longest: int = _LONGEST) -> Pieces:
    """Divide the entries of every latent into pieces of `longest` at most.

    There are P = F + M / longest pieces at most, so nothing has to be known on the host.

    Args:
        offsets: (F,) where the entries of each latent begin.
        entries: M.
        longest: entries of a piece.
    """
    n_latents, device = len(offsets), offsets.device
    counts = torch.diff(offsets, append=offsets.new_full((1,), entries))
    pieces = (counts + longest - 1) // longest
    ends = pieces.cumsum(0)
    most = n_latents + entries // longest
    number = torch.arange(most, device=device)
    latent = torch.searchsorted(ends, number, right=True)  # n_latents for pieces that are none
    of = latent.clamp(max=n_latents - 1)
    starts = offsets[of] + (number - (ends - pieces)[of]) * longest
    starts = torch.where(latent < n_latents, starts, entries)
    # The bag of the last latent would have all that are none: one warp would walk them.
    rest = ends[-1] + longest * torch.arange(most // longest + 1, device=device)
    offsets = torch.cat([ends - pieces, rest.clamp(max=most)])
    return Pieces(starts.int(), number.int(), offsets.int())


def decoder_dot(grad_Nd: Tensor, table_Fd: Tensor, code: TransposedCode) -> Tensor:
    """<grad[row], table[latent]> by latent, (M,): the gradient of a decoded value to its code.

    2 M d FLOPs; reads F rows of the table and M gradients: a row of the table serves all entries of
    its latent. On a CPU in float32 as fast as in bfloat16 or faster, and 1.4 to 1.8 times as fast
    as row by row. Gradients that no core's cache holds are taken some rows at a time, with the same
    result, where latents have enough entries in so many rows (the table is read again for each).
    """
    row, latent, order = code.row, code.latent, None
    shift = _rows_at_a_time(grad_Nd, len(row) / len(table_Fd))
    if shift is not None:
        order = (row >> shift).to(torch.int16).sort(stable=True).indices
        row, latent = row.index_select(0, order), latent.index_select(0, order)
    out: Tensor = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        table_Fd, grad_Nd, row, code.offsets, latent, 0, -1
    )
    return out if order is None else torch.empty_like(out).index_copy_(0, order, out)


def _rows_at_a_time(grad_Nd: Tensor, entries_of_latent: float) -> int | None:
    """Logarithm to 2 of the rows that fit into a core's cache; None: all are taken together.

    Every piece reads the table again, so that its latents should have some entries there.
    """
    row_bytes = grad_Nd.shape[1] * grad_Nd.element_size()
    if grad_Nd.device.type != "cpu" or len(grad_Nd) * row_bytes <= _core_cache():
        return None
    shift = max(0, (int(0.6 * _core_cache()) // row_bytes).bit_length() - 1)
    pieces = -(-len(grad_Nd) >> shift)
    return shift if 1 < pieces < 1 << 15 and entries_of_latent >= 3 * pieces else None


@cache
def _core_cache() -> int:
    """Bytes of a core's second-level cache; 1 MiB where the system does not say."""
    try:
        said = Path("/sys/devices/system/cpu/cpu0/cache/index2/size").read_text()
        return int(said.strip().removesuffix("K")) << 10
    except (OSError, ValueError):
        return 1 << 20


@cache
def dots_in_float32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `decoder_dot` is taken of what was not rounded to `dtype`.

    On a CPU, where it takes no longer, and in bfloat16 on CUDA before torch 2.13, which has no
    kernel for it: https://github.com/pytorch/pytorch/issues/185808. No GPU has run either yet.
    """
    old = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13)
    return device.type == "cpu" or (dtype == torch.bfloat16 and old)


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
    if code.pieces is not None:
        return latent_sums_by_pieces(code, code.pieces, weight_M, rows_Nd)
    return embedding_bag(code.row, rows_Nd, code.offsets, mode="sum", per_sample_weights=weight_M)


def latent_sums_by_pieces(
    code: TransposedCode, pieces: Pieces, weight_M: Tensor, rows_Nd: Tensor
) -> Tensor:
    """`latent_sums` for a GPU, where one warp walks a bag: none has many entries.

    Else the time of a step would be that of the latent that fires most. The sums of pieces are
    summed. No GPU has timed it yet.
    """
    sums = embedding_bag(code.row, rows_Nd, pieces.starts, mode="sum", per_sample_weights=weight_M)
    of_latents: Tensor = embedding_bag(pieces.number, sums, pieces.offsets, mode="sum")
    return of_latents[: len(code.offsets)]


def bytes_by_pieces(n_latents: int, width: int, entries: int, dtype: torch.dtype) -> int:
    """Bytes that a GPU needs for the pieces of `latent_sums`, beside results.

    Args:
        n_latents: F.
        width: d of the rows that are summed.
        entries: M.
        dtype: of the products.
    """
    kept, passing = 20, 48  # of a piece: int32, and int64 while they are worked out
    return (n_latents + entries // _LONGEST) * (kept + max(width * dtype.itemsize, passing))


def mark(flags: Tensor, places: Tensor) -> None:
    """Set flags, (n,) bool, at some places, (M,) int64. Writes M bytes."""
    if flags.device.type == "cpu":  # threads of torch that write next to each other are slower
        flags.numpy()[places.numpy()] = True
    else:
        flags.index_fill_(0, places, True)

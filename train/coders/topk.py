"""The largest of every row, of groups of a row, of a batch: selection, and the thresholds of rows.

After the products it is the largest part of a step, and all of it is exact. Shape letters: N rows,
F latents, k selected latents per row, M = N k entries. Costs are per coder. What was tried and lost
is in benchmarks/records/select_*.md, step_*.md and train_*.md.
"""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import torch
from torch import Tensor

from bsc.train.coders.kernels import Entries

__all__ = [
    "batch_topk",
    "folded_values",
    "group_topk",
    "groupmax",
    "newton_shift",
    "select_topk",
]

_NEWTON_STEPS = 7
_LOOKED_AT = 8
"""Rows that tell whether a fast way is worth trying."""


def select_topk(pre_NF: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest entries of every row, exactly: values and indices, (N, k), in no given order.

    Of equal entries any may be taken, but each at most once. Reads N F values once. Where F is
    large against k by `_cascade`: half of the time of `torch.topk` on a CPU, on a GPU not measured
    yet.
    """
    folds = _folds(pre_NF.shape[1], k)
    if folds:
        return _cascade(pre_NF, k, folds)
    values, indices = pre_NF.topk(k, dim=-1, sorted=False)
    return values, indices


def _folds(n_latents: int, k: int) -> tuple[int, ...]:
    """Factors by which a row is folded for its k largest: 4 k groups or more remain.

    >>> _folds(9216, 16), _folds(9216, 64), _folds(9216, 128), _folds(9216, 4000), _folds(9215, 2)
    ((8, 8), (4, 4), (4, 4), (), ())
    """
    total = 1
    while total < 64 and n_latents % (2 * total) == 0 and n_latents // (2 * total) >= 4 * k:
        total *= 2
    return {64: (8, 8), 32: (4, 4), 16: (4, 4), 8: (8,), 4: (4,)}.get(total, ())


def folded_values(n_latents: int, k: int) -> int:
    """Maxima that `select_topk` makes of a row on its way.

    >>> folded_values(9216, 16), folded_values(9216, 64), folded_values(9215, 2)
    (1296, 2880, 0)
    """
    made, size = 0, n_latents
    for fold in _folds(n_latents, k):
        size //= fold
        made += size
    return made


def _cascade(pre_NF: Tensor, k: int, folds: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """The k largest of every row by way of the maxima of groups of latents.

    The k groups with the largest maxima hold the k largest entries: were one outside, k maxima
    would be larger or equal to it. So a row is folded (group j holds columns j, j + n, j + 2n, ...:
    maxima over such groups run in vector lanes), the k best groups are found among few maxima, and
    their members are the candidates of the level below. One pass over N F values, then work on
    N k fold values per level.

    In bfloat16 on a CPU the maxima are those of the bits as int16, which take a third of the time.
    Bits of numbers that are not negative have their order; a group of negative ones alone may get
    another of them, but one that is negative too. So what is found is exact where nothing negative
    is among it, by the argument above. Some rows are looked at first, and where that does not hold
    for them (margins below 0 are selected where few are above), bits are not tried.
    """
    fits = pre_NF.shape[1] // math.prod(folds) <= 1 << 16
    if pre_NF.dtype != torch.bfloat16 or pre_NF.device.type != "cpu" or not fits:
        return _descended(pre_NF, k, folds)
    if _positive(pre_NF, k):
        values, index = _descended_by_keys(pre_NF, k, folds, by_bits=True)
        if bool((values >= 0).all()):
            return values, index
    return _descended_by_keys(pre_NF, k, folds, by_bits=False)


def _positive(pre_NF: Tensor, k: int) -> bool:
    """Whether the k largest entries of some rows of bfloat16 on a CPU are above 0."""
    some = pre_NF[:: max(1, len(pre_NF) // _LOOKED_AT)]
    ordered, place = _ordered(some.view(torch.int16)).numpy(), some.shape[1] - k
    ordered.partition(place, axis=1)
    return bool((ordered[:, place] > 0).all())


def _descended(pre_NF: Tensor, k: int, folds: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """`_cascade` with `torch.topk` at every level."""
    levels = [pre_NF]
    for fold in folds:
        levels.append(levels[-1].unflatten(1, (fold, -1)).amax(1))
    values, index = levels.pop().topk(k, dim=1, sorted=False)
    for fold, level in zip(reversed(folds), reversed(levels), strict=True):
        n = level.shape[1]
        members = torch.arange(0, n, n // fold, device=index.device)
        candidates = (index.unsqueeze(2) + members).flatten(1)
        values, best = level.gather(1, candidates).topk(k, dim=1, sorted=False)
        index = candidates.gather(1, best)
    return values, index


def _descended_by_keys(
    pre_NF: Tensor, k: int, folds: tuple[int, ...], *, by_bits: bool
) -> tuple[Tensor, Tensor]:
    """`_cascade` in bfloat16 on a CPU, by maxima of values or of their bits.

    Value and column go into one int32, whose order is that of the values: numpy then partitions
    integers with vector instructions, 2 to 5 times as fast as torch finds the k largest of short
    rows, and the columns come along. Where columns do not fit into 16 bits, places among the
    candidates do.
    """
    levels = [pre_NF.view(torch.int16)]
    for fold in folds:
        level = levels[-1] if by_bits else levels[-1].view(torch.bfloat16)
        levels.append(level.unflatten(1, (fold, -1)).amax(1).view(torch.int16))
    bits = levels.pop()
    columns = torch.arange(bits.shape[1], dtype=torch.int32)
    keys, columns = _largest(bits if by_bits else _ordered(bits), columns, k)
    for fold, level in zip(reversed(folds), reversed(levels), strict=True):
        n = level.shape[1]
        members = torch.arange(0, n, n // fold, dtype=torch.int32)
        candidates = (columns.unsqueeze(1) + members.unsqueeze(1)).flatten(1)
        bits = level.gather(1, candidates.long())
        fits = n <= 1 << 16
        places = candidates if fits else torch.arange(k * fold, dtype=torch.int32)
        keys, columns = _largest(bits if by_bits else _ordered(bits), places, k)
        if not fits:
            columns = candidates.gather(1, columns.long())
    bits = (keys >> 16).short()
    return (bits if by_bits else _ordered(bits)).view(torch.bfloat16), columns.long()


def _ordered(bits: Tensor) -> Tensor:
    """Bits of bfloat16 (sign and magnitude) as int16 in the order of the values, and back."""
    return (bits >> 15 & 0x7FFF) ^ bits


def _largest(bits_Nn: Tensor, places: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of every row of int16: keys of value and place, and the places, (N, k) int32.

    Args:
        bits_Nn: rows, int16.
        places: names of their columns below 2^16, int32, (n,) or (N, n).
        k: how many.
    """
    keys = bits_Nn.int()
    torch.add(places, keys, alpha=1 << 16, out=keys)
    array, (n_rows, n) = keys.numpy(), keys.shape
    workers = torch.get_num_threads()
    bounds = [n_rows * i // workers for i in range(workers + 1)]
    list(_pool(workers).map(
        lambda a, b: array[a:b].partition(n - k, axis=1), bounds[:-1], bounds[1:]
    ))  # fmt: skip
    best = keys[:, n - k :]
    return best, best & 0xFFFF


@cache
def _pool(workers: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(workers, thread_name_prefix="select")


def groupmax(pre_NF: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The largest entry of each of k groups of F / k adjacent latents, values and indices (N, k).

    Reads N F values; no sorting.
    """
    size = pre_NF.shape[1] // k
    values, inside = pre_NF.unflatten(1, (k, size)).max(dim=2)
    return values, inside + torch.arange(0, k * size, size, device=inside.device)


def group_topk(pre_NF: Tensor, k: int, candidates: int) -> tuple[Tensor, Tensor]:
    """The largest entries of each of k groups of F / k adjacent latents, descending.

    Returns:
        Values and indices, (N, k, candidates); fewer candidates where a group has fewer latents.
    """
    size = pre_NF.shape[1] // k
    values, inside = pre_NF.unflatten(1, (k, size)).topk(min(candidates, size), dim=2)
    return values, inside + torch.arange(0, k * size, size, device=inside.device).view(1, k, 1)


def newton_shift(pre_NF: Tensor, k: int) -> Tensor:
    """For every row the number t at which sum_f sigmoid(pre_f + t) = k, (N, 1), float32 or better.

    Seven Newton steps from 0, as in the authors' code; here on the logarithm of the sum, which is
    nearly linear where few sigmoids are large, and a step that leaves the bracket of the root is
    replaced by its middle, since Newton's method diverges where all sigmoids are flat. Each step
    passes over N F values. With k = F there is no root: t then makes the sigmoids nearly 1.
    """
    pre = pre_NF.float() if pre_NF.dtype.itemsize < 4 else pre_NF
    share = min(k / pre.shape[1], 1 - 1e-6)
    level = math.log(share / (1 - share))
    low = level - pre.amax(dim=1, keepdim=True)
    high = level - pre.amin(dim=1, keepdim=True)
    t = torch.zeros_like(low).clamp(low, high)
    for _ in range(_NEWTON_STEPS):
        s = torch.sigmoid(pre + t)
        total = s.sum(dim=1, keepdim=True)
        low, high = torch.where(total < k, t, low), torch.where(total < k, high, t)
        step = t - (total / k).log() * total / (s * (1 - s)).sum(dim=1, keepdim=True)
        inside = (step >= low) & (step <= high)  # false for a step that is not finite
        t = torch.where(inside, step, (low + high) / 2)
    return t


def batch_topk(pre_NF: Tensor, k: int) -> tuple[Tensor, Entries, Tensor]:
    """The k N largest entries of a whole batch, exactly.

    First the 4 k largest of every row, then the k N largest of those, of which the smallest is a
    floor. Where all candidates of a row are above it, more of that row may be: all of its values
    from the floor on then take part too. Cost of `select_topk` with 4 k, and some passes over 4 k N
    values.

    Returns:
        Their values (M,), row by row, the entries, and the smallest value, a scalar.
    """
    n, n_latents = pre_NF.shape
    wide = min(4 * k, n_latents)
    values_Nw, index_Nw = select_topk(pre_NF, wide)
    best = values_Nw.flatten().topk(n * k, sorted=False).indices
    taken = torch.zeros(n * wide, dtype=torch.bool, device=pre_NF.device)
    taken = taken.index_fill_(0, best, True).view(n, wide)
    full = taken.all(1)
    whole = wide == n_latents or not bool(full.any())
    if whole and pre_NF.device.type == "cuda":  # a mask as an index would wait for the device
        best = best.sort().values
        values, latent, row = values_Nw.flatten()[best], index_Nw.flatten()[best], best // wide
        first = torch.arange(n, dtype=row.dtype, device=row.device)
        offsets = torch.searchsorted(row, first, out_int32=True)
        return values, Entries(latent.int(), row.int(), offsets), values.min()
    if whole:
        values, latent, per_row = values_Nw[taken], index_Nw[taken], taken.sum(1)
    else:
        floor = values_Nw[taken].min()
        rows_of_full = full.nonzero().flatten()
        some = taken & ~full.unsqueeze(1)
        more = pre_NF[rows_of_full] >= floor
        row = torch.cat([some.nonzero()[:, 0], rows_of_full[more.nonzero()[:, 0]]])
        values = torch.cat([values_Nw[some], pre_NF[rows_of_full][more]])
        latent = torch.cat([index_Nw[some], more.nonzero()[:, 1]])
        best = values.topk(min(n * k, len(values)), sorted=False).indices
        row, order = row[best].sort(stable=True)
        values, latent = values[best][order], latent[best][order]
        per_row = torch.bincount(row, minlength=n)
    offsets = per_row.cumsum(0) - per_row
    rows = torch.arange(n, dtype=torch.int32, device=pre_NF.device).repeat_interleave(per_row)
    return values, Entries(latent.int(), rows, offsets.int()), values.min()

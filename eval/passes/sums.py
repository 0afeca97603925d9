"""Sums by document or by latent, added up in an order that is always the same."""

from __future__ import annotations

from torch import Tensor

__all__ = ["add_to"]


def add_to(total: Tensor, index: Tensor, values: Tensor) -> None:
    """total[index[i]] += values[i], so that the same rows give the same bits on every run.

    On a GPU `index_add_` adds as its threads come; `index_put_` sorts by index first and then adds
    in order.

    Args:
        total: (groups,), is changed.
        index: (n,) int64, the group of each value.
        values: (n,) in the dtype of `total`.
    """
    if total.device.type == "cpu":
        total.index_add_(0, index, values)
    else:
        total.index_put_((index,), values, accumulate=True)

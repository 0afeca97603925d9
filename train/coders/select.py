"""Which latents of a row may be active: top-k, group maximum, batch top-k, for one or two parts.

A continuous or binary coder has one part, a hybrid two, each selecting among its own latents.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from bsc.train.coders import topk
from bsc.train.coders.config import CoderConfig, Part
from bsc.train.coders.kernels import Entries

__all__ = ["Selection", "code_values", "parts_at", "select", "select_dense"]


class Selection(NamedTuple):
    """The selected latents of a batch."""

    entries: Entries
    margin: Tensor
    """(M,): pre - theta of each, in the dtype of the margins."""


def parts_at(config: CoderConfig, k: int) -> tuple[Part, ...]:
    """The parts of a coder while it selects k latents instead of its own number."""
    if k == config.k:
        return config.parts
    return tuple(
        p._replace(k=min(p.stop - p.start, max(1, round(p.k * k / config.k)))) for p in config.parts
    )


def select(config: CoderConfig, margin_NF: Tensor, k: int) -> Selection:
    """Select in training: batch top-k takes the batch that it is given.

    Args:
        config: the coder.
        margin_NF: pre - theta of every latent.
        k: latents per row at this time.
    """
    parts = parts_at(config, k)
    if config.select != "batch_topk":
        margins, indices = select_dense(config, margin_NF, parts)
        return Selection(Entries.of(indices), margins.reshape(-1))
    values, entries, _ = topk.batch_topk(margin_NF[:, : parts[0].stop], parts[0].k)
    if len(parts) == 1:
        return Selection(entries, values)
    more, others, _ = topk.batch_topk(margin_NF[:, parts[1].start :], parts[1].k)
    row, order = torch.cat([entries.row, others.row]).sort(stable=True)
    latent = torch.cat([entries.latent, others.latent + parts[1].start])[order]
    merged = Entries(latent, row, entries.offsets + others.offsets)
    return Selection(merged, torch.cat([values, more])[order])


def select_dense(
    config: CoderConfig, margin_NF: Tensor, parts: Sequence[Part]
) -> tuple[Tensor, Tensor]:
    """Top-k or group maximum of every part: margins and latents, (N, k)."""
    one = topk.groupmax if config.select == "groupmax" else topk.select_topk
    found = [one(margin_NF[:, p.start : p.stop], p.k) for p in parts]
    if len(found) == 1:
        return found[0]
    return (
        torch.cat([v for v, _ in found], dim=1),
        torch.cat([i + p.start for (_, i), p in zip(found, parts, strict=True)], dim=1),
    )


def code_values(config: CoderConfig, latent: Tensor, margin: Tensor) -> Tensor:
    """Code of selected latents: relu(pre), or 1[margin > 0], or 1 where they are `always_on`."""
    if config.code == "continuous":
        return margin.relu()
    ones = torch.ones_like(margin) if config.always_on else (margin > 0).to(margin.dtype)
    if config.code == "binary":
        return ones
    return torch.where(latent >= config.first_binary, ones, margin.relu())

"""How well a coder reconstructs, and which latents fire, over the held-out rows of a store.

    FVU = sum_n |y_n - y_hat_n|^2 / sum_n |y_n - mean y|^2

with the mean over all rows that are evaluated; both sums run in float64 and are divided once. 0 is
perfect, 1 is as good as the mean row, more is possible. A mean of per-batch ratios is another
number. Definitions: docs/coders.md, Figures.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bsc.cache.kept import kept_moments, kept_rows
from bsc.cache.store import StoreSplit
from bsc.train.coders.coder import SparseCoder

__all__ = ["Fidelity", "measure", "site_arrays"]

FREQUENT = (0.01, 0.1, 0.5)
"""Firing rates above which latents are counted; above the second one is ultra-high frequency."""
HISTOGRAM_EDGES = [x / 4 for x in range(-24, 1)]
"""log10 of the firing rate."""


@dataclass(frozen=True)
class Fidelity:
    """Figures of one coder over `rows` rows."""

    rows: int
    fvu: float
    fvu_median_channel: float
    """Median over output channels of the channel's own FVU."""
    fvu_skip_only: float
    """FVU with every latent off: what the skip path and b_dec explain."""
    l0: float
    """Mean number of latents per row that are not 0."""
    counts: Tensor
    """(F,) int64: rows in which each latent is not 0."""

    @property
    def rates(self) -> Tensor:
        """(F,) float64: firing rates."""
        return self.counts.double() / self.rows

    def to_json(self) -> dict[str, Any]:
        """The figures of eval.json."""
        rates, firings = self.rates, int(self.counts.sum())
        alive = rates[rates > 0].log10()
        histogram = torch.histc(
            alive.clamp(HISTOGRAM_EDGES[0], HISTOGRAM_EDGES[-1]),
            bins=len(HISTOGRAM_EDGES) - 1,
            min=HISTOGRAM_EDGES[0],
            max=HISTOGRAM_EDGES[-1],
        )
        return {
            "rows": self.rows,
            "fvu": self.fvu,
            "fvu_median_channel": self.fvu_median_channel,
            "fvu_skip_only": self.fvu_skip_only,
            "l0": self.l0,
            "latents": len(rates),
            "dead": int((self.counts == 0).sum()),
            # Rule of three: never seen in N rows means a rate below 3 / N at 95 % confidence.
            "dead_rate_bound": 3 / self.rows,
            "firings": firings,
            "latents_above": {str(t): int((rates > t).sum()) for t in FREQUENT},
            "share_of_firings_above": {
                str(t): float(self.counts[rates > t].sum() / max(1, firings)) for t in FREQUENT
            },
            "log10_rate_histogram": {
                "edges": HISTOGRAM_EDGES,
                "counts": [int(c) for c in histogram],
            },
        }


def site_arrays(coder: SparseCoder, hookpoint: str) -> tuple[str, str]:
    """Names of the arrays that a coder reads and reconstructs."""
    return f"{hookpoint}/{coder.config.side}", f"{hookpoint}/output"


def _device_batches(
    split: StoreSplit,
    names: tuple[str, str],
    rows: int,
    coder: SparseCoder,
    without_tokens: Collection[int],
) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows of both sides that are read (cache/kept.py)."""
    device = coder.W_enc.device
    for shard in range(split.shards):
        kept = kept_rows(split, shard, names, without_tokens)
        sides = [split.shard_rows(name, shard) for name in names]
        for start in range(0, split.grid.shard_rows, rows):
            stop = min(start + rows, split.grid.shard_rows)
            x, y = (side.part(start, stop) for side in sides)
            if kept is not None:
                here = torch.from_numpy(kept[start:stop])
                x, y = x[here], y[here]
            if len(x):
                yield x.to(device, coder.dtype), y.to(device, coder.dtype)


@torch.inference_mode()
def measure(
    coder: SparseCoder,
    split: StoreSplit,
    hookpoint: str,
    *,
    batch_rows: int = 8192,
    without_tokens: Collection[int] = (),
) -> Fidelity:
    """Reconstruct every row of a split and add up.

    Args:
        coder: the coder, on the device where to compute.
        split: rows to evaluate on, normally the held-out ones.
        hookpoint: module whose rows they are.
        batch_rows: rows at a time; the result does not depend on it but for rounding.
        without_tokens: token ids whose rows are left out, as they were in training.
    """
    names = site_arrays(coder, hookpoint)
    mean = kept_moments(split, names[1], without_tokens).mean.to(coder.W_enc.device)
    total = torch.zeros_like(mean)
    residual, skip_residual = torch.zeros_like(total), torch.zeros_like(total)
    counts = torch.zeros(coder.config.n_latents, dtype=torch.int64, device=mean.device)
    rows = 0
    for x, y in _device_batches(split, names, batch_rows, coder, without_tokens):
        code = coder.encode(x)
        residual += (y - coder.decode(code, x)).double().square().sum(0)
        skip_residual += (y - coder.skip(x)).double().square().sum(0)
        total += (y.double() - mean).square().sum(0)
        counts += torch.bincount(code.latent[code.value != 0], minlength=len(counts))
        rows += len(x)
    varying = total > 0
    return Fidelity(
        rows=rows,
        fvu=float(residual.sum() / total.sum()),
        fvu_median_channel=float((residual[varying] / total[varying]).median()),
        fvu_skip_only=float(skip_residual.sum() / total.sum()),
        l0=float(counts.sum() / rows),
        counts=counts.cpu(),
    )

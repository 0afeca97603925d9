"""How well a coder reconstructs, from the sums of one pass (passes/row_pass.py).

    FVU = sum_n |y_n - y_hat_n|^2 / sum_n |y_n - mean y|^2

with the mean over all rows that are evaluated; both sums run in float64 and are divided once. 0 is
perfect, 1 is as good as the mean row, more is possible. A mean of per-batch ratios is another
number. Definitions: docs/evaluation.md.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from bsc.eval.evaluation import Fidelity, Interval
from bsc.eval.figures.intervals import ratio_intervals
from bsc.eval.passes.row_pass import Sums

__all__ = ["fidelity_figures", "fvu", "fvu_difference"]


def fvu(sums: Sums, kind: str = "coder") -> float:
    """FVU over all rows and channels of one kind of reconstruction."""
    return float(sums.channel[kind].sum() / sums.channel["total"].sum())


def fidelity_figures(sums: Sums) -> Fidelity:
    """FVU of a coder with its interval over documents, and of what belongs beside it."""
    kinds = [k for k in sums.channel if k != "total"]
    used = sums.document_rows > 0
    intervals = ratio_intervals(
        np.stack([sums.by_document[k][used] for k in kinds], axis=1),
        sums.by_document["total"][used],
        positive=True,
    )
    interval = dict(zip(kinds, intervals, strict=True))
    total = sums.channel["total"]
    varying = total > 0
    some: dict[str, Any] = {}
    new = sums.unseen["rows"] > 0
    if (n := int(sums.unseen["rows"].sum())) < sums.rows:
        error, deviation = sums.unseen["coder"][new], sums.unseen["total"][new]
        some |= {
            "rows_unseen": n,
            "fvu_unseen": float(error.sum() / deviation.sum()) if n else None,
            "fvu_unseen_interval": ratio_intervals(error[:, None], deviation, positive=True)[0],
        }
    if "binarised" in kinds:
        some["fvu_binarised"] = fvu(sums, "binarised")
        some["fvu_binarised_interval"] = interval["binarised"]
    return Fidelity(
        rows=sums.rows,
        fvu=fvu(sums),
        fvu_interval=interval["coder"],
        fvu_median_channel=float(np.median(sums.channel["coder"][varying] / total[varying])),
        fvu_skip_only=fvu(sums, "skip"),
        fvu_gain=fvu(sums, "skip") - fvu(sums),
        fvu_quantised=fvu(sums, "quantised" if "quantised" in kinds else "coder"),
        l0=float(sums.counts.sum() / sums.rows),
        **some,
    )


def fvu_difference(a: Sums, b: Sums) -> tuple[float, Interval]:
    """FVU of one coder less that of another of the same rows, with its interval over documents.

    Paired: what is hard to reconstruct for both does not widen it.
    """
    used = a.document_rows > 0
    (interval,) = ratio_intervals(
        (a.by_document["coder"] - b.by_document["coder"])[used, None], a.by_document["total"][used]
    )
    return fvu(a) - fvu(b), interval

"""What finetuning changed: coders of a run beside those that they began as.

Both runs were evaluated on the same documents, so differences are paired by document (of probes by
class). A latent keeps its number, so how far it moved is seen directly, without matching.
Definitions: docs/finetuning.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bsc.array_file import read_arrays
from bsc.eval.compare import Difference
from bsc.eval.evaluation import EvaluationFolder, Interval, Probing
from bsc.eval.figures.firing import firing_counts
from bsc.eval.figures.intervals import ratio_intervals, value_interval
from bsc.eval.figures.stability import Matching, firing_jaccard
from bsc.eval.interp.scores import InterpFolder
from bsc.eval.passes.codes import Codes
from bsc.eval.passes.pieces import Pieces
from bsc.records import expected_form
from bsc.train.run import Run
from bsc.train.run_config import FinetunedCoder
from bsc.typed import Record

__all__ = [
    "PROBE",
    "Changed",
    "Closed",
    "FinetunedChange",
    "Moved",
    "ProbeChange",
    "finetuned_changes",
]

PROBE = ("sae_bench", "1")
"""Arm and number of latents of the probe that tables and figures show."""
PLAIN = ("l0", "dead", "ultra_per_token", "bits")
"""Figures whose plain difference is shown."""
_QUANTILES = (0.05, 0.5, 0.95)


class Closed(Record):
    """How much of what a splice costs the model is gone: 1 - after / before."""

    share: float
    interval: Interval


class Moved(Record):
    """How far the latents moved. Quantiles over them: 5 %, 50 %, 95 %."""

    latents: int
    """Those that fire before or after; the others are left out."""
    encoder_cosine: list[float]
    """Of a latent's encoder row before and after."""
    decoder_cosine: list[float]
    jaccard: list[float] | None
    """Rows where it fires before and after, over rows where it fires before or after. None where
    other rows were evaluated, or the codes are not there, as of a run that was pulled."""


class ProbeChange(Record):
    """Accuracy of one probe."""

    set: str
    arm: str
    columns: str
    """How many latents the probe reads."""
    accuracy: Difference
    """With its interval over classes."""


class FinetunedChange(Record):
    """A coder before and after."""

    coder: str
    """Name of the finetuned one."""
    parent: str
    delta_ce: Difference
    kl: Difference
    fvu: Difference
    delta_ce_closed: Closed | None
    """None where the splice cost nothing before."""
    kl_closed: Closed | None
    l0: Difference
    bits: Difference
    dead: Difference
    ultra_per_token: Difference
    ultra: Difference
    """Latents that fire on more than 10 % of the rows."""
    predictability: Difference | None
    """Mean AUC over latents, as `bsc interp` without a judge gives it; None where either was not
    scored."""
    predictability_weighted: Difference | None
    """The same weighted by firings."""
    probes: list[ProbeChange]
    moved: Moved

    def differences(self) -> list[tuple[str, Difference]]:
        """Every difference by the name of its figure."""
        plain = [
            (name, getattr(self, name))
            for name in type(self).model_fields
            if isinstance(getattr(self, name), Difference)
        ]
        probes = [(f"{p.set} {p.arm} {p.columns}", p.accuracy) for p in self.probes]
        return [*plain, *probes]


class Changed(Record):
    """All coders of a run that another one finetuned."""

    before: str
    after: str
    loss: str
    coders: list[FinetunedChange]


def finetuned_changes(before: Run, after: Run) -> Changed | None:
    """What the second run changed in the coders of the first, if it finetuned them.

    Args:
        before: an evaluated run.
        after: an evaluated run. None is returned where its coders did not begin as the first's.

    Raises:
        StoreError: a run is not evaluated, or its files are damaged.
    """
    made = after.config().finetuned
    if made is None:
        return None
    known = set(before.coder_names())
    pairs = [
        c
        for c in after.config().coders
        if isinstance(c, FinetunedCoder)
        and c.parent in known
        and before.coder(c.parent).xxh3_128() == c.parent_xxh3_128
    ]
    a, b = _Side(before), _Side(after)
    if a.evaluation.store_id != b.evaluation.store_id:
        return None  # of other documents
    pairs = [c for c in pairs if c.parent in a.evaluation.coders and c.name in b.evaluation.coders]
    if not pairs:
        return None
    with expected_form(
        f"what was evaluated of {before.folder} or {after.folder}",
        "`bsc eval` evaluates them again.",
    ):
        changes = [_change(a, b, c) for c in pairs]
    return Changed(
        before=str(before.folder), after=str(after.folder), loss=made.loss, coders=changes
    )


class _Side:
    """An evaluated run."""

    def __init__(self, run: Run) -> None:
        folder = EvaluationFolder(run)
        self.run, self.evaluation = run, folder.read()
        self.arrays = read_arrays(folder.documents, folder.remedy)
        self.offline = InterpFolder(run).read_offline()

    def array(self, coder: str, name: str) -> NDArray[np.float64] | None:
        """Sums by document; None in evaluations of an earlier version that did not keep them."""
        found = self.arrays.get(f"{coder}/{name}")
        return None if found is None else found.astype(np.float64)


def _change(a: _Side, b: _Side, planned: FinetunedCoder) -> FinetunedChange:
    x, y = planned.parent, planned.name
    f, g = a.evaluation.coders[x], b.evaluation.coders[y]
    clean, predicted = a.arrays["clean/nats"], a.arrays["predicted"].astype(np.float64)
    same = np.array_equal(predicted, b.arrays["predicted"])
    of_ce = [None, None] if not same else [s.array(n, "nats") for s, n in ((a, x), (b, y))]
    of_kl = [None, None] if not same else [s.array(n, "kl") for s, n in ((a, x), (b, y))]
    error = [s.array(n, "squared_error") for s, n in ((a, x), (b, y))]
    total, other = a.array(x, "squared_deviation"), b.array(y, "squared_deviation")
    # But for the order in which a GPU adds up.
    if (
        total is None
        or other is None
        or total.shape != other.shape
        or not np.allclose(total, other, rtol=1e-9)
    ):
        error = [None, None]
    cost = [None if own is None else own - clean for own in of_ce]
    plain = {
        name: Difference(first=f[name], second=g[name], difference=g[name] - f[name])
        for name in PLAIN
    }
    ultra = f.latents_above["0.1"], g.latents_above["0.1"]
    return FinetunedChange(
        coder=y,
        parent=x,
        delta_ce=_paired(f.delta_ce, g.delta_ce, cost, predicted),
        kl=_paired(f.kl, g.kl, of_kl, predicted),
        fvu=_paired(f.fvu, g.fvu, error, total),
        delta_ce_closed=_closed(f.delta_ce, g.delta_ce, cost),
        kl_closed=_closed(f.kl, g.kl, of_kl),
        ultra=Difference(first=ultra[0], second=ultra[1], difference=ultra[1] - ultra[0]),
        predictability=_predictability(a, x, b, y, weighted=False),
        predictability_weighted=_predictability(a, x, b, y, weighted=True),
        probes=_probes(a.evaluation.probing, x, b.evaluation.probing, y),
        moved=_moved(a.run, x, b.run, y, same_rows=f.rows == g.rows),
        **plain,
    )


_Sums = Sequence[NDArray[np.float64] | None]
"""Of the coder before and after, by document."""


def _paired(
    first: float, second: float, sums: _Sums, weights: NDArray[np.float64] | None
) -> Difference:
    """The difference of two ratios of sums over the same documents."""
    interval: Interval = None
    before, after = sums
    if before is not None and after is not None and weights is not None:
        (interval,) = ratio_intervals((after - before)[:, None], weights)
    return Difference(first=first, second=second, difference=second - first, interval=interval)


def _closed(first: float, second: float, sums: _Sums) -> Closed | None:
    if first <= 0:
        return None
    before, after = sums
    interval: Interval = None
    if before is not None and after is not None:
        (interval,) = ratio_intervals((before - after)[:, None], before)
    return Closed(share=1 - second / first, interval=interval)


def _predictability(a: _Side, x: str, b: _Side, y: str, *, weighted: bool) -> Difference | None:
    if a.offline is None or b.offline is None:
        return None
    if x not in a.offline.coders or y not in b.offline.coders:
        return None
    means = [s.coders[n].predictability.auc for s, n in ((a.offline, x), (b.offline, y))]
    first, second = ((m.weighted if weighted else m.unweighted).mean for m in means)
    if first is None or second is None:
        return None
    return Difference(first=first, second=second, difference=second - first)


def _probes(
    before: dict[str, Probing], x: str, after: dict[str, Probing], y: str
) -> list[ProbeChange]:
    found = []
    for name in before.keys() & after.keys():
        first, second = before[name].coders.get(x, {}), after[name].coders.get(y, {})
        same = (before[name].classes, before[name].test) == (after[name].classes, after[name].test)
        probes = [(arm, k) for arm, by_k in first.items() for k in by_k if same]
        for arm, columns in probes:
            if columns not in second.get(arm, {}):
                continue
            one, other = first[arm][columns], second[arm][columns]
            classes = np.array([other.classes[c] - one.classes[c] for c in one.classes])
            found.append(
                ProbeChange(
                    set=name,
                    arm=arm,
                    columns=columns,
                    accuracy=Difference(
                        first=one.accuracy,
                        second=other.accuracy,
                        difference=other.accuracy - one.accuracy,
                        interval=value_interval(classes),
                    ),
                )
            )
    return sorted(found, key=lambda p: (p.set, p.arm, p.columns))


def _moved(before: Run, x: str, after: Run, y: str, *, same_rows: bool) -> Moved:
    coders = before.coder(x), after.coder(y)
    counts = firing_counts(before, x), firing_counts(after, y)
    alive = np.flatnonzero(counts[0] + counts[1])
    codes = [
        Codes(Pieces(EvaluationFolder(run).codes(name)), own)
        for run, name, own in ((before, x, counts[0]), (after, y, counts[1]))
    ]
    cosines = [
        _cosines(getattr(coders[0], matrix), getattr(coders[1], matrix), alive)
        for matrix in ("W_enc", "W_dec")
    ]
    themselves = Matching(alive, alive, cosines[1], "themselves", 0.0)
    there = same_rows and all(sum(len(f.row) for f in c) == c.counts.sum() for c in codes)
    return Moved(
        latents=len(alive),
        encoder_cosine=_quantiles(cosines[0]),
        decoder_cosine=_quantiles(cosines[1]),
        jaccard=_quantiles(firing_jaccard(codes[0], codes[1], themselves)) if there else None,
    )


def _cosines(a: Any, b: Any, rows: NDArray[np.int64]) -> NDArray[np.float64]:
    from torch.nn.functional import cosine_similarity

    found: NDArray[np.float64] = cosine_similarity(a[rows], b[rows], dim=1).double().numpy()
    return found


def _quantiles(values: NDArray[np.float64]) -> list[float]:
    return [float(q) for q in np.quantile(values, _QUANTILES)] if len(values) else []

"""`bsc compare`: the coders of two runs side by side.

Coders of one name, or else of one config but for the seed, are a pair. Where both runs were
evaluated on the same rows and the same contexts, differences are paired by document, so that what
is hard for both does not widen the interval. Differences over seeds are given with an interval
only where there are enough seeds for one.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from bsc.array_file import read_arrays
from bsc.errors import UserError
from bsc.eval.evaluation import Evaluation, EvaluationFolder, Interval, Likeness
from bsc.eval.figures.firing import firing_counts
from bsc.eval.figures.intervals import ratio_intervals, value_interval
from bsc.eval.figures.stability import stability_figures
from bsc.eval.measured_rows import measured_rows
from bsc.records import expected_form
from bsc.train.run import Run
from bsc.train.run_config import RunCoder
from bsc.typed import Record

__all__ = ["ComparedCoders", "Comparison", "compare_runs"]

SINGLE = ("l0", "bits", "delta_top1", "kl", "dead")
"""Figures whose plain difference is shown."""


def _documents(run: Run) -> dict[str, NDArray[Any]]:
    folder = EvaluationFolder(run)
    return read_arrays(folder.documents, folder.remedy)


def _pairs(first: Run, second: Run) -> list[tuple[str, str]]:
    """Names of the coders that are compared."""
    a, b = first.config().coders, second.config().coders
    if first.folder.resolve() != second.folder.resolve():
        there = {c.name for c in b}
        if same := [(c.name, c.name) for c in a if c.name in there]:
            return same
    groups: list[dict[RunCoder, list[str]]] = [{}, {}]
    for planned, group in zip((a, b), groups, strict=True):
        for one in sorted(planned, key=lambda c: c.seed):
            group.setdefault(one.but_for_the_seed, []).append(one.name)
    if first.folder.resolve() == second.folder.resolve():
        return [pair for names in groups[0].values() for pair in itertools.pairwise(names)]
    return [
        pair
        for key, names in groups[0].items()
        for pair in zip(names, groups[1].get(key, []), strict=False)
    ]


class Difference(Record):
    """A figure of two coders."""

    first: int | float
    second: int | float
    difference: int | float
    """The second less the first."""
    interval: Interval = None
    """Paired by document, of figures that are sums over documents."""


class ComparedCoders(Record):
    """Two coders beside each other."""

    first: str
    second: str
    fvu: Difference
    delta_ce: Difference
    l0: Difference
    bits: Difference
    delta_top1: Difference
    kl: Difference
    dead: Difference
    latents: Likeness | None = None
    """How alike they are; None: the coders have other widths."""


class MeanDifference(Record):
    """Mean of a difference over seeds."""

    difference: float
    interval: Interval


class ComparedSeeds(Record):
    """Coders that differ in nothing but their seed."""

    coders: str
    """Name of one of them."""
    seeds: int
    fvu: MeanDifference
    delta_ce: MeanDifference


class Comparison(Record):
    """Two runs beside each other."""

    first: str
    second: str
    paired: bool
    """Whether the same contexts were evaluated, with coders on the same tokens, so that losses are
    paired."""
    same_rows: bool
    """Whether FVU, L0 and dead latents are of the same rows."""
    coders: list[ComparedCoders]
    means: list[ComparedSeeds]


class _Side(NamedTuple):
    """One of the runs."""

    run: Run
    evaluation: Evaluation
    arrays: dict[str, NDArray[Any]]


def compare_runs(first: Run, second: Run, pairs: Sequence[str] = ()) -> Comparison:
    """Differences of the second run's coders from the first's.

    Args:
        first: an evaluated run.
        second: another, or the same: then its coders that differ in the seed are compared.
        pairs: coders that are compared, as ``"first=second"`` with names or parts of them; none:
            those of one name, or alike but for their seed.

    Raises:
        UserError: a run is not evaluated, or no coders of the two can be compared.
    """
    a, b = (_Side(run, EvaluationFolder(run).read(), _documents(run)) for run in (first, second))
    asked = [_named_pair(first, second, pair) for pair in pairs]
    for x, y in asked:
        for side, name in ((a, x), (b, y)):
            if name not in side.evaluation.coders:
                raise UserError(f"{side.run.folder}: {name} turned non-finite: it has no figures.")
    found = [
        (x, y)
        for x, y in asked or _pairs(first, second)
        if x in a.evaluation.coders and y in b.evaluation.coders
    ]
    if not found and first.folder.resolve() == second.folder.resolve():
        raise UserError(
            f"{first.folder}: a run beside itself: its coders that differ in the seed alone are "
            f"compared, and it has none. Train with --seed 0 --seed 1, or name another run."
        )
    if not found:
        raise UserError(
            f"{first.folder} and {second.folder} have no coders to compare: none share a name, and "
            f"none differ in their seed alone. --pair FIRST=SECOND names two."
        )
    with expected_form(
        f"documents.safetensors of {first.folder} or {second.folder}",
        "`bsc eval` evaluates them again.",
    ):
        rows, others = (measured_rows(s.run.config(), s.evaluation) for s in (a, b))
        same_store = rows.store_id == others.store_id
        predicted = a.arrays["predicted"], b.arrays["predicted"]
        # Tokens that one of them leaves out stay as they are in the other's losses alone.
        same_contexts = (
            same_store
            and rows.without_tokens == others.without_tokens
            and np.array_equal(*predicted)
        )
        coders = [
            _compared(a, x, b, y, same_store=same_store, same_contexts=same_contexts)
            for x, y in found
        ]
    return Comparison(
        first=str(first.folder),
        second=str(second.folder),
        paired=same_contexts,
        same_rows=rows == others,
        coders=coders,
        means=[] if asked else _means(first, second, coders),
    )


def _named_pair(first: Run, second: Run, pair: str) -> tuple[str, str]:
    """Names of two coders from FIRST=SECOND.

    Raises:
        UserError: it is no pair, a name is not that of one coder, or they belong elsewhere.
    """
    names = pair.split("=")
    if len(names) != 2 or not all(names):
        raise UserError(f"--pair {pair}: should be FIRST=SECOND, a coder of each run.")
    x, y = first.full_name(names[0]), second.full_name(names[1])
    hooks = first.config().coder(x).hookpoint, second.config().coder(y).hookpoint
    if hooks[0] != hooks[1]:
        raise UserError(
            f"--pair {pair}: {x} is of {hooks[0]} and {y} of {hooks[1]}, so their figures are of "
            f"other rows."
        )
    return x, y


def _compared(
    a: _Side, x: str, b: _Side, y: str, *, same_store: bool, same_contexts: bool
) -> ComparedCoders:
    """Coder x of one run and coder y of another."""
    f, g = a.evaluation.coders[x], b.evaluation.coders[y]
    intervals: dict[str, Interval] = {"fvu": None, "delta_ce": None}
    total = a.arrays[f"{x}/squared_deviation"], b.arrays[f"{y}/squared_deviation"]
    # But for the order in which a GPU adds up.
    if same_store and total[0].shape == total[1].shape and np.allclose(*total, rtol=1e-9):
        used = total[0] > 0
        error = b.arrays[f"{y}/squared_error"] - a.arrays[f"{x}/squared_error"]
        (intervals["fvu"],) = ratio_intervals(error[used, None], total[0][used])
    if same_contexts:
        nats = b.arrays[f"{y}/nats"] - a.arrays[f"{x}/nats"]
        predicted = a.arrays["predicted"].astype(np.float64)
        (intervals["delta_ce"],) = ratio_intervals(nats[:, None], predicted)
    differences: dict[str, Any] = {}
    for figure in ("fvu", "delta_ce", *SINGLE):
        # Those that have none have no field of it.
        some = {"interval": intervals[figure]} if figure in intervals else {}
        differences[figure] = Difference(
            first=f[figure], second=g[figure], difference=g[figure] - f[figure], **some
        )
    coders = a.run.coder(x), b.run.coder(y)
    if coders[0].config.d_out == coders[1].config.d_out:
        counts = firing_counts(a.run, x), firing_counts(b.run, y)
        differences["latents"] = stability_figures(*coders, counts)
    return ComparedCoders(first=x, second=y, **differences)


def _means(first: Run, second: Run, coders: list[ComparedCoders]) -> list[ComparedSeeds]:
    """Mean differences over the seeds of each kind of coder, where there are several.

    Only between two runs: within one run which seed comes first is no difference.
    """
    if first.folder.resolve() == second.folder.resolve():
        return []
    config = first.config()
    kinds: dict[RunCoder, list[ComparedCoders]] = {}
    for one in coders:
        kinds.setdefault(config.coder(one.first).but_for_the_seed, []).append(one)
    return [
        ComparedSeeds(
            coders=own[0].first,
            seeds=len(own),
            fvu=_mean([one.fvu for one in own]),
            delta_ce=_mean([one.delta_ce for one in own]),
        )
        for own in kinds.values()
        if len(own) > 1
    ]


def _mean(figures: list[Difference]) -> MeanDifference:
    values = np.array([one.difference for one in figures])
    return MeanDifference(difference=float(values.mean()), interval=value_interval(values))

"""`bsc compare`: the coders of two runs side by side.

Coders of one name, or else of one config but for the seed, are a pair. Where both runs were
evaluated on the same rows and the same contexts, differences are paired by document, so that what
is hard for both does not widen the interval. Differences over seeds are given with an interval
only where there are enough seeds for one.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bsc.array_file import read_arrays
from bsc.errors import UserError
from bsc.eval.figures.firing import firing_counts
from bsc.eval.figures.intervals import ratio_intervals, value_interval
from bsc.eval.figures.stability import stability_figures
from bsc.files import canonical_json
from bsc.records import expected_form
from bsc.train.run import Run

__all__ = ["compare_runs"]

SINGLE = ("l0", "bits", "delta_top1", "kl", "dead")
"""Figures whose plain difference is shown."""


def _documents(run: Run) -> dict[str, NDArray[Any]]:
    path = run.eval_folder / "documents.safetensors"
    return read_arrays(path, f"`bsc eval {run.folder}` writes it.")


def _planned(run: Run) -> dict[str, dict[str, Any]]:
    return {str(c["name"]): c for c in run.config()["coders"]}


def _without_seed(planned: dict[str, Any]) -> str:
    """What coders share that differ in their seed alone."""
    return canonical_json({k: v for k, v in planned.items() if k not in ("name", "seed")})


def _pairs(first: Run, second: Run) -> list[tuple[str, str]]:
    """Names of the coders that are compared."""
    a, b = _planned(first), _planned(second)
    if first.folder.resolve() != second.folder.resolve():
        same = [(n, n) for n in a if n in b]
        if same:
            return same
    groups: list[dict[str, list[str]]] = [{}, {}]
    for planned, found in zip((a, b), groups, strict=True):
        for name, one in sorted(planned.items(), key=lambda item: int(item[1]["seed"])):
            found.setdefault(_without_seed(one), []).append(name)
    if first.folder.resolve() == second.folder.resolve():
        return [pair for names in groups[0].values() for pair in itertools.pairwise(names)]
    return [
        pair
        for key, names in groups[0].items()
        for pair in zip(names, groups[1].get(key, []), strict=False)
    ]


def compare_runs(first: Run, second: Run) -> dict[str, Any]:
    """Differences of the second run's coders from the first's.

    Args:
        first: an evaluated run.
        second: another, or the same: then its coders that differ in the seed are compared.

    Returns:
        paired (whether the same rows and contexts were evaluated), coders (one entry for each pair:
        first, second, fvu, delta_ce and others with `difference` and `interval`, and `latents`, how
        alike they are) and means (over seeds, of coders that differ in nothing else).

    Raises:
        UserError: a run is not evaluated, or no coders of the two can be compared.
    """
    with expected_form(f"{first.folder} or {second.folder}", "`bsc eval` evaluates them again."):
        return _compared(first, second)


def _compared(first: Run, second: Run) -> dict[str, Any]:
    evaluations = first.evaluation(), second.evaluation()
    pairs = [
        (x, y)
        for x, y in _pairs(first, second)
        if x in evaluations[0]["coders"] and y in evaluations[1]["coders"]
    ]
    if not pairs and first.folder.resolve() == second.folder.resolve():
        raise UserError(
            f"{first.folder}: a run beside itself: its coders that differ in the seed alone are "
            f"compared, and it has none. Train with --seed 0 --seed 1, or name another run."
        )
    if not pairs:
        raise UserError(
            f"{first.folder} and {second.folder} have no coders to compare: none share a name, and "
            f"none differ in their seed alone."
        )
    arrays = _documents(first), _documents(second)
    same_store = evaluations[0]["store_id"] == evaluations[1]["store_id"]
    predicted = [a["predicted"] for a in arrays]
    same_contexts = same_store and np.array_equal(predicted[0], predicted[1])
    found = []
    for x, y in pairs:
        f, g = evaluations[0]["coders"][x], evaluations[1]["coders"][y]
        entry: dict[str, Any] = {"first": x, "second": y}
        for figure in ("fvu", "delta_ce"):
            entry[figure] = {"first": f[figure], "second": g[figure],
                             "difference": g[figure] - f[figure], "interval": None}  # fmt: skip
        total = [a[f"{n}/squared_deviation"] for a, n in zip(arrays, (x, y), strict=True)]
        if (
            same_store
            and total[0].shape == total[1].shape
            and np.allclose(total[0], total[1], rtol=1e-9)
        ):
            error = [a[f"{n}/squared_error"] for a, n in zip(arrays, (x, y), strict=True)]
            used = total[0] > 0
            difference = (error[1] - error[0])[used, None]
            entry["fvu"]["interval"] = ratio_intervals(difference, total[0][used])[0]
        if same_contexts:
            difference = arrays[1][f"{y}/nats"] - arrays[0][f"{x}/nats"]
            entry["delta_ce"]["interval"] = ratio_intervals(
                difference[:, None], predicted[0].astype(np.float64)
            )[0]
        for figure in SINGLE:
            entry[figure] = {"first": f[figure], "second": g[figure],
                             "difference": g[figure] - f[figure]}  # fmt: skip
        coders = first.coder(x), second.coder(y)
        if coders[0].config.d_out == coders[1].config.d_out:
            counts = firing_counts(first, x), firing_counts(second, y)
            entry["latents"] = stability_figures(*coders, counts)
        found.append(entry)
    return {
        "first": str(first.folder), "second": str(second.folder), "paired": same_contexts,
        "coders": found, "means": _means(first, second, found),
    }  # fmt: skip


def _equal(a: NDArray[Any], b: NDArray[Any]) -> bool:
    """But for the order in which a GPU adds up."""
    return a.shape == b.shape and bool(np.allclose(a, b, rtol=1e-9, atol=0))


def _means(first: Run, second: Run, entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean differences over the seeds of each kind of coder, where there are several.

    Only between two runs: within one run which seed comes first is no difference.
    """
    if first.folder.resolve() == second.folder.resolve():
        return []
    planned = _planned(first)
    kinds: dict[str, list[dict[str, Any]]] = {}
    for entry in entries:
        kinds.setdefault(_without_seed(planned[entry["first"]]), []).append(entry)
    found = []
    for own in kinds.values():
        if len(own) > 1:
            mean: dict[str, Any] = {"coders": own[0]["first"], "seeds": len(own)}
            for figure in ("fvu", "delta_ce"):
                differences = np.array([e[figure]["difference"] for e in own])
                mean[figure] = {
                    "difference": float(differences.mean()),
                    "interval": value_interval(differences),
                }
            found.append(mean)
    return found

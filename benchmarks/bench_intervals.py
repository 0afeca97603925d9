"""How often do intervals over documents hold the truth, on real documents?

The documents of evaluated runs are taken as the population: n of them are drawn with replacement,
the interval is computed, and it is counted how often it holds the figure of the population. For FVU
and delta CE, for the method of bsc/eval/figures/intervals.py and, for comparison, for others:

* expanded: the bootstrap's percentiles, moved outwards by Student's t (what bsc had before)
* studentised: the bootstrap of (r* - r) / s*
* bca: bias-corrected and accelerated
* jackknife: Student's interval with n - 1 degrees of freedom

    python benchmarks/bench_intervals.py POPULATION... [--write tests/eval/documents.json]

A population is an evaluated run, or a file that --write wrote. The last line is JSON. `--write`
keeps the sums of the documents of coders with k 32 for the test.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from bsc.array_file import read_arrays
from bsc.eval.evaluation import EvaluationFolder
from bsc.eval.figures.intervals import ratio_intervals
from bsc.train.run import Run

Array = NDArray[np.float64]
DRAWS = (10, 25, 34, 60)
RESAMPLES = 1_000


def documents(run: Run) -> dict[str, dict[str, Array]]:
    """By coder: what its figures are ratios of, by document."""
    arrays = read_arrays(run.eval_folder / "documents.safetensors", "Evaluate the run first.")
    predicted = arrays["predicted"].astype(np.float64)
    found = {}
    for name in sorted(EvaluationFolder(run).read().coders):
        deviation = arrays[f"{name}/squared_deviation"]
        used, spliced = deviation > 0, predicted > 0
        found[name] = {
            "squared_error": arrays[f"{name}/squared_error"][used],
            "squared_deviation": deviation[used],
            "added_nats": (arrays[f"{name}/nats"] - arrays["clean/nats"])[spliced],
            "predicted": predicted[spliced],
        }
    return found


def _ours(
    a: Array, b: Array, rng: np.random.Generator, positive: bool = False
) -> tuple[float, float]:
    (interval,) = ratio_intervals(a[:, None], b, positive=positive)
    return (interval[0], interval[1]) if interval else (-np.inf, np.inf)


def _resampled(a: Array, b: Array, rng: np.random.Generator) -> tuple[Array, Array]:
    """Ratios of resamples, and the standard error of each."""
    n = len(a)
    times = rng.multinomial(n, np.full(n, 1 / n), size=RESAMPLES).astype(np.float64)
    r = (times @ a) / (times @ b)
    squares = times @ a**2 - 2 * r * (times @ (a * b)) + r**2 * (times @ b**2)
    return r, np.sqrt(np.maximum(squares, 0) * n / (n - 1)) / (times @ b)


def _expanded(a: Array, b: Array, rng: np.random.Generator) -> tuple[float, float]:
    n = len(a)
    low = stats.norm.cdf(stats.t.ppf(0.025, n - 1) * np.sqrt(n / (n - 1)))
    found = np.quantile(_resampled(a, b, rng)[0], [low, 1 - low])
    return float(found[0]), float(found[1])


def _studentised(a: Array, b: Array, rng: np.random.Generator) -> tuple[float, float]:
    r0 = a.sum() / b.sum()
    s0 = np.sqrt(np.square(a - r0 * b).sum() * len(a) / (len(a) - 1)) / b.sum()
    r, s = _resampled(a, b, rng)
    low, high = np.quantile((r - r0)[s > 0] / s[s > 0], [0.025, 0.975])
    return float(r0 - high * s0), float(r0 - low * s0)


def _bca(a: Array, b: Array, rng: np.random.Generator) -> tuple[float, float]:
    r, r0 = _resampled(a, b, rng)[0], a.sum() / b.sum()
    without = (a.sum() - a) / (b.sum() - b)
    d = without.mean() - without
    acceleration = (d**3).sum() / (6 * (d**2).sum() ** 1.5 + 1e-300)
    z0 = stats.norm.ppf(np.clip((r < r0).mean(), 1e-3, 1 - 1e-3))
    z = z0 + stats.norm.ppf([0.025, 0.975])
    found = np.quantile(r, stats.norm.cdf(z0 + z / (1 - acceleration * z)))
    return float(found[0]), float(found[1])


def _jackknife(a: Array, b: Array, rng: np.random.Generator) -> tuple[float, float]:
    n, r0 = len(a), a.sum() / b.sum()
    without = (a.sum() - a) / (b.sum() - b)
    s = np.sqrt((n - 1) / n * np.square(without - without.mean()).sum())
    reach = float(stats.t.ppf(0.975, n - 1) * s)
    return r0 - reach, r0 + reach


METHODS: dict[str, Callable[[Array, Array, np.random.Generator], tuple[float, float]]] = {
    "bsc": _ours, "expanded": _expanded, "studentised": _studentised, "bca": _bca,
    "jackknife": _jackknife,
}  # fmt: skip


def coverage(
    a: Array, b: Array, n: int, trials: int, *, positive: bool
) -> dict[str, dict[str, float]]:
    """By method the share of intervals that hold the ratio of all, and their median width."""
    truth = a.sum() / b.sum()
    found = {}
    for name, method in (METHODS | {"bsc": partial(_ours, positive=positive)}).items():
        draws, rng = np.random.default_rng(n), np.random.default_rng(0)
        held, width = [], []
        for _ in range(trials):
            i = draws.integers(len(a), size=n)
            low, high = method(a[i], b[i], rng)
            held.append(low <= truth <= high)
            width.append(high - low)
        found[name] = {
            "coverage": round(float(np.mean(held)), 4), "width": round(float(np.median(width)), 5)
        }  # fmt: skip
    return found


def main() -> None:
    """Print a line for each run, coder, figure and number of documents, then one of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("populations", nargs="+", type=Path)
    parser.add_argument("--trials", type=int, default=1_000)
    parser.add_argument("--write", type=Path)
    args = parser.parse_args()
    results: list[dict[str, Any]] = []
    kept: dict[str, Any] = {}
    found: dict[str, dict[str, dict[str, Array]]] = {}
    for path in args.populations:
        if path.suffix == ".json":
            for name, coders in json.loads(path.read_text()).items():
                found[name] = {
                    coder: {k: np.array(v, np.float64) for k, v in own.items()}
                    for coder, own in coders.items()
                }
        else:
            found[path.resolve().name] = documents(Run.open(path))
    for population, coders in found.items():
        for name, own in coders.items():
            short = name.rsplit("/", 1)[-1]
            if "-k32-" in short:
                kept.setdefault(population, {})[short] = {
                    k: [float(f"{x:.6g}") for x in v] for k, v in own.items()
                }
            for figure, a, b in (
                ("fvu", own["squared_error"], own["squared_deviation"]),
                ("delta_ce", own["added_nats"], own["predicted"]),
            ):
                for n in DRAWS:
                    held = coverage(a, b, n, args.trials, positive=figure == "fvu")
                    results.append(
                        {"population": population, "coder": short, "figure": figure,
                         "documents": len(a), "drawn": n, "methods": held}
                    )  # fmt: skip
                    cells = [f"{m} {f['coverage']:.3f}" for m, f in held.items()]
                    print(f"{population} {short} {figure} of {len(a)}, {n}: {', '.join(cells)}",
                          flush=True)  # fmt: skip
    if args.write:
        args.write.write_text(json.dumps(kept, separators=(",", ":")) + "\n")
    print(json.dumps({"benchmark": "intervals", "trials": args.trials, "results": results}))


if __name__ == "__main__":
    main()

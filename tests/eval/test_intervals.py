from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from bsc.eval.figures.intervals import (
    MIN_SAMPLE,
    degrees_of_freedom,
    ratio_intervals,
    value_interval,
)


@pytest.mark.parametrize("contexts", [10, 20, 120])
def test_intervals_cover_the_truth_as_often_as_they_say(contexts: int) -> None:
    """1,000 draws of contexts of different sizes: 95 % of the intervals hold the true ratio."""
    rng = np.random.default_rng(1)
    # All draws as columns, each with contexts of its own.
    sizes = rng.integers(20, 60, size=(contexts, 1_000)).astype(np.float64)
    of_context = rng.normal(0.1, 0.2, size=sizes.shape)  # what the tokens of a context share
    values = sizes * of_context + np.sqrt(sizes) * rng.normal(0, 0.5, size=sizes.shape)
    found = ratio_intervals(values, sizes)
    covered = [i[0] <= 0.1 <= i[1] for i in found if i is not None]
    assert len(covered) == 1_000
    assert 0.93 <= np.mean(covered) <= 0.97


def test_an_interval_over_tokens_would_be_too_short() -> None:
    """Why contexts are drawn and not tokens: those of one context share what they share."""
    rng = np.random.default_rng(0)
    tokens, contexts = 50, 60
    shared = rng.normal(0.1, 0.2, size=(300, contexts, 1))
    values = shared + rng.normal(0, 0.2, size=(300, contexts, tokens))

    def coverage(blocks: NDArray[np.float64]) -> float:
        found = ratio_intervals(blocks.T.copy(), np.ones(blocks.shape[1]))
        return float(np.mean([i is not None and i[0] <= 0.1 <= i[1] for i in found]))

    assert coverage(values.reshape(300, -1)) < 0.6
    assert coverage(values.mean(axis=2)) > 0.9


def test_no_interval_is_invented_from_few_contexts() -> None:
    ones = np.ones((MIN_SAMPLE - 1, 2))
    assert ratio_intervals(ones, np.ones(MIN_SAMPLE - 1)) == [None, None]
    # Documents without a token are none.
    empty = np.append(np.ones(MIN_SAMPLE - 1), np.zeros(5))
    assert ratio_intervals(empty[:, None], empty) == [None]
    assert value_interval(np.array([0.5])) is None
    assert value_interval(np.full(MIN_SAMPLE, 0.5)) == [0.5, 0.5]


POPULATIONS = json.loads((Path(__file__).parent / "documents.json").read_text())
"""Sums of real documents, by benchmarks/bench_intervals.py: of the demo's held-out documents; of a
quarter of the standard library (wide); and of the demo's of before, when four tables that nearly
copy each other held 45 % of the variance (heavy)."""


@pytest.mark.parametrize("n", [10, 25, 34])
@pytest.mark.parametrize("figure", ["fvu", "delta_ce"])
@pytest.mark.parametrize("population", sorted(POPULATIONS))
def test_intervals_hold_the_truth_on_real_documents(population: str, figure: str, n: int) -> None:
    """Documents drawn from a population whose figure is known: at least 93 % of the intervals."""
    assert len(POPULATIONS[population]) == 2  # a binary and a continuous coder
    rng = np.random.default_rng(n)
    for own in POPULATIONS[population].values():
        names = {"fvu": ("squared_error", "squared_deviation"),
                 "delta_ce": ("added_nats", "predicted")}[figure]  # fmt: skip
        a, b = (np.array(own[name], np.float64) for name in names)
        drawn = rng.integers(len(a), size=(n, 3_000))
        found = ratio_intervals(a[drawn], b[drawn], positive=figure == "fvu")
        truth = a.sum() / b.sum()
        held = np.mean([i is not None and i[0] <= truth <= i[1] for i in found])
        assert held >= 0.93, (population, figure, n, held)


def test_where_one_document_holds_nearly_all_little_is_known() -> None:
    """Nine documents of ten tokens say little beside one of ten thousand."""
    sizes = np.array([10_000, *[10] * 9], np.float64)
    assert degrees_of_freedom(np.ones(10)) == 9 and degrees_of_freedom(sizes) == 1
    rng = np.random.default_rng(0)
    means = 0.3 + 0.05 * rng.standard_normal((10, 200))
    held = {}
    for name, weights in (("equal", np.ones(10)), ("unequal", sizes)):
        found = ratio_intervals(means * weights[:, None], weights)
        held[name] = np.mean([i is not None and i[0] <= 0.3 <= i[1] for i in found])
    assert min(held.values()) > 0.9, held


def test_ratios_of_what_is_not_negative_have_intervals_above_0() -> None:
    rng = np.random.default_rng(0)
    errors = rng.exponential(size=(9, 500)) ** 3
    for interval in ratio_intervals(errors, np.ones(9), positive=True):
        assert interval is not None and interval[0] > 0
    # What may be negative has the interval of its mirror image, whatever signs the sample has.
    for x, y in zip(ratio_intervals(errors, np.ones(9)), ratio_intervals(-errors, np.ones(9)),
                    strict=True):  # fmt: skip
        assert x is not None and y is not None and x == pytest.approx([-y[1], -y[0]])
    # What is 0 in all documents but one has an interval too.
    one = np.zeros((20, 1))
    one[3] = 1.0
    (interval,) = ratio_intervals(one, np.ones(20), positive=True)
    assert interval is not None and interval[0] < 0 < 0.05 < interval[1]


def test_differences_of_columns_are_columns() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 50))
    sizes = np.ones(50)
    one, two, difference = ratio_intervals(np.stack([a, a, a - a], axis=1), sizes)
    assert one == two and difference == [0.0, 0.0]
    assert ratio_intervals(np.stack([b], axis=1), sizes) == ratio_intervals(b[:, None], sizes)

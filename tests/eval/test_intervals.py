from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from bsc.eval.intervals import MIN_BLOCKS, ratio_intervals, value_interval


@pytest.mark.parametrize("contexts", [10, 20, 120])
def test_intervals_cover_the_truth_as_often_as_they_say(contexts: int) -> None:
    """1,000 draws of contexts of different sizes: 95 % of the intervals hold the true ratio."""
    rng = np.random.default_rng(1)
    # All draws as columns, each with contexts of its own: the same resamples serve all of them.
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
    ones = np.ones((MIN_BLOCKS - 1, 2))
    assert ratio_intervals(ones, np.ones(MIN_BLOCKS - 1)) == [None, None]
    assert value_interval(np.array([0.5])) is None
    assert value_interval(np.full(MIN_BLOCKS, 0.5)) == [0.5, 0.5]


def test_columns_see_the_same_resamples() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 50))
    sizes = np.ones(50)
    one, two, difference = ratio_intervals(np.stack([a, a, a - a], axis=1), sizes)
    assert one == two and difference == [0.0, 0.0]
    assert ratio_intervals(np.stack([b], axis=1), sizes) == ratio_intervals(b[:, None], sizes)

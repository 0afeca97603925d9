from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from bsc.eval.interp.sampling import choose


@pytest.fixture(scope="module")
def counts() -> NDArray[np.int64]:
    """Of 2,000 latents, with a few that fire very often, and 200 dead ones."""
    rng = np.random.default_rng(0)
    found = (rng.pareto(1.2, 2_000) * 30).astype(np.int64) + 1
    found[:200] = 0
    return rng.permutation(found)


def test_the_weighted_mean_is_unbiased_and_ten_times_as_sharp_as_a_uniform_sample(
    counts: NDArray[np.int64],
) -> None:
    # Frequent latents have other scores, as they do.
    score = 0.9 - 0.06 * np.log10(np.maximum(counts, 1)) + 0.1 * np.sin(np.arange(len(counts)))
    truth = (counts * score).sum() / counts.sum()
    weighted, uniform, first = [], [], []
    for seed in range(300):
        c = choose(counts, 60, census=np.quantile(counts, 0.99), seed=seed)
        d = c.weighted
        weighted.append((d.weight * score[d.latent]).sum() / d.weight.sum())
        u = c.unweighted.latent
        uniform.append((counts[u] * score[u]).sum() / counts[u].sum())
    first_n = np.flatnonzero(counts)[:60]
    first.append((counts[first_n] * score[first_n]).sum() / counts[first_n].sum())
    error = np.std(weighted) / np.sqrt(len(weighted))
    assert abs(np.mean(weighted) - truth) < 4 * error + 1e-4
    assert np.std(weighted) < np.std(uniform) / 2
    assert abs(first[0] - truth) > 5 * np.std(weighted)  # what tools do that take the first latents


def test_weights_stand_for_the_whole_population(counts: NDArray[np.int64]) -> None:
    for n in (1, 10, 100, 5_000):
        found = choose(counts, n, census=1e9)
        assert found.unweighted.weight.sum() == pytest.approx((counts > 0).sum())
        assert found.weighted.weight.sum() == pytest.approx(counts.sum())
        assert not np.isin(found.latents(), np.flatnonzero(counts == 0)).any()
    # With room for all it is no sample any more.
    assert found.weighted.census.all() and found.unweighted.census.all()
    assert np.array_equal(found.weighted.weight, counts[found.weighted.latent])


def test_every_latent_above_a_rate_is_in_the_weighted_sample(counts: NDArray[np.int64]) -> None:
    border = int(np.quantile(counts, 0.98))
    found = choose(counts, 20, census=border).weighted
    frequent = np.flatnonzero(counts >= border)
    assert np.isin(frequent, found.latent[found.census]).all()
    assert len(found.latent) <= len(frequent) + 20


def test_rare_latents_are_counted_and_not_drawn(counts: NDArray[np.int64]) -> None:
    found = choose(counts, 50, census=1e9, min_firings=30)
    assert counts[found.latents()].min() >= 30
    rare = (counts > 0) & (counts < 30)
    assert found.unweighted.left_out == pytest.approx(rare.sum() / (counts > 0).sum())
    assert found.weighted.left_out == pytest.approx(counts[rare].sum() / counts.sum())


def test_the_samples_share_latents_and_grow_by_adding(counts: NDArray[np.int64]) -> None:
    small, large = choose(counts, 30, census=1e9), choose(counts, 60, census=1e9)
    for a, b in zip(small, large, strict=True):
        assert np.isin(a.latent, b.latent).all()  # nothing that was paid for is left behind
    shared = len(np.intersect1d(large.unweighted.latent, large.weighted.latent))
    others = [choose(counts, 60, census=1e9, seed=s).weighted.latent for s in range(1, 30)]
    independent = np.mean([len(np.intersect1d(large.unweighted.latent, o)) for o in others])
    assert shared > 1.5 * independent


def test_a_coder_that_never_fires_has_an_empty_sample() -> None:
    found = choose(np.zeros(10, np.int64), 5, census=1.0)
    assert found.latents() == [] and found.weighted.population == 0

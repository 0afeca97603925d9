from __future__ import annotations

import math

import numpy as np
import pytest

from bsc.eval.evaluation import CoderFigures
from bsc.eval.figures.firing import dead_rate_bound, firing_figures
from bsc.eval.figures.rate import bit_figures, interpolated, matched, value_entropies
from tests.eval.planted import latent_code


def h(p: float) -> float:
    return -(p * math.log2(p) + (1 - p) * math.log2(1 - p))


def test_bits_of_planted_rates_are_their_closed_forms() -> None:
    rng = np.random.default_rng(0)
    rates = np.array([0.5, 0.1, 0.02, 0.0])
    n = 200_000
    dense = (rng.random((n, 4)) < rates).astype(np.float32)
    found = bit_figures(latent_code(dense), n, 0, None)
    assert found["bits_firing"] == pytest.approx(sum(map(h, rates[:3])), rel=0.01)
    assert found["bits_values"] == 0 and found["bits"] == found["bits_firing"]


def test_bits_of_values_are_the_entropy_of_their_levels() -> None:
    """Latent 0 has eight equally likely levels: 3 bits a firing. Latent 1 has one: none."""
    rng = np.random.default_rng(0)
    n = 80_000
    dense = np.zeros((n, 3), np.float32)
    fires = rng.random(n) < 0.25
    dense[fires, 0] = 0.1 + 0.5 * rng.integers(0, 8, size=fires.sum())
    dense[:, 1] = 0.3
    step = np.array([0.5, 0.5, 0.5])
    entropies = value_entropies(latent_code(dense), step)
    assert entropies == pytest.approx([3.0, 0.0, 0.0], abs=1e-3)
    found = bit_figures(latent_code(dense), n, 3, step)
    assert found["bits_values"] == pytest.approx(0.25 * 3, rel=0.02)
    assert found["bits_firing"] == pytest.approx(h(0.25), rel=0.01)
    # The last latents of a hybrid code have no values, whatever their margins are.
    assert bit_figures(latent_code(dense), n, 0, step)["bits_values"] == 0
    # Half of the step is a bit more.
    finer = value_entropies(latent_code(dense * 2), step)
    assert finer[0] == pytest.approx(3.0, abs=1e-3)


def test_blocks_of_latents_do_not_change_entropies(monkeypatch: pytest.MonkeyPatch) -> None:
    from bsc.eval.passes.codes import LatentCode

    rng = np.random.default_rng(0)
    dense = rng.random((500, 20)).astype(np.float32) * (rng.random((500, 20)) < 0.3)
    code, step = latent_code(dense), np.full(20, 0.2)
    whole = value_entropies(code, step)
    monkeypatch.setattr(LatentCode, "ranges", lambda self: ((i, i + 1) for i in range(20)))
    assert np.array_equal(whole, value_entropies(code, step))


def test_nothing_is_extrapolated() -> None:
    points = [(8.0, 0.4), (32.0, 0.2)]
    assert interpolated(points, 16) == pytest.approx(0.3)
    assert interpolated(points, 7.9) is None and interpolated(points, 33) is None
    assert interpolated([], 8) is None
    binary, others = (
        [CoderFigures.model_construct(l0=l0, fvu=fvu) for l0, fvu in points]
        for points in ([(4.0, 0.6), (16.0, 0.5)], [(8.0, 0.4), (32.0, 0.2)])
    )
    (found,) = matched(binary, others, "l0", "fvu")
    assert found.at == 16 and found.binary == 0.5 and found.other == pytest.approx(0.3)


def test_planted_rates_are_counted_and_dead_latents_bounded() -> None:
    n = 1_000
    counts = np.array([0, 0, 5, 11, 101, 501, 1_000])
    found = firing_figures(counts, n)
    assert found["dead"] == 2 and found["firings"] == counts.sum()
    assert found["latents_above"] == {"0.01": 4, "0.1": 3, "0.5": 2}
    assert found["share_of_firings_above"]["0.5"] == pytest.approx(1_501 / counts.sum())
    assert found["ultra_per_token"] == pytest.approx(1.602)
    assert sum(found["log10_rate_histogram"]["counts"]) == 5


def test_the_bound_of_a_dead_latent_is_one_that_five_percent_would_miss() -> None:
    """At the bound a latent stays silent in all rows with a probability of 5 %."""
    for n in (100, 65_536):
        assert (1 - dead_rate_bound(n)) ** n == pytest.approx(0.05)
    rng = np.random.default_rng(0)
    silent = rng.binomial(200, dead_rate_bound(200), size=20_000) == 0
    assert silent.mean() == pytest.approx(0.05, abs=0.01)


def test_latents_that_never_fire_break_nothing() -> None:
    found = firing_figures(np.zeros(4, np.int64), 100)
    assert found["dead"] == 4 and found["share_of_firings_above"]["0.1"] == 0
    assert bit_figures(latent_code(np.zeros((10, 4), np.float32)), 10, 4, np.ones(4))["bits"] == 0

"""Verdicts on simulated studies whose answer is known, and estimates by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from benchmarks.bench_verdicts import SPREADS, simulated
from bsc.study.config import Bound
from bsc.study.estimates import Estimate, Sums, Verdict, decide, estimate, resolution

STUDIES = 400


def share(verdicts: list[Verdict], verdict: Verdict) -> float:
    return verdicts.count(verdict) / len(verdicts)


@pytest.mark.parametrize("spread", SPREADS)
def test_arms_of_one_distribution_are_rarely_told_apart(spread: str) -> None:
    rng = np.random.default_rng(1)
    made = [simulated(rng, 0.0, **SPREADS[spread]) for _ in range(STUDIES)]
    inside = [e for e in made if (i := e.interval()) and i[0] < 0 < i[1]]
    # 2.5 % on either side, and three standard errors of so many studies.
    assert len(inside) / STUDIES > 0.95 - 3 * math.sqrt(0.05 * 0.95 / STUDIES)
    verdicts = [decide([e], [Bound("above", 0)]) for e in made]
    most = 0.025 + 3 * math.sqrt(0.025 * 0.975 / STUDIES)
    assert share(verdicts, "holds") < most
    assert share(verdicts, "does not hold") < most


@pytest.mark.parametrize("spread", SPREADS)
def test_an_effect_of_the_size_that_is_said_is_decided_in_four_studies_of_five(spread: str) -> None:
    rng = np.random.default_rng(2)
    pilot = [resolution(simulated(rng, 0.0, **SPREADS[spread])) or math.nan for _ in range(STUDIES)]
    effect = float(np.sqrt(np.mean(np.square(pilot))))  # of the true error, which none knows
    made = [simulated(rng, effect, **SPREADS[spread]) for _ in range(STUDIES)]
    for sign, bound in ((1, Bound("above", 0)), (-1, Bound("below", 0))):
        turned = [e._replace(mean=sign * e.mean) for e in made]
        right = share([decide([e], [bound]) for e in turned], "holds")
        wrong = share([decide([e], [bound]) for e in turned], "does not hold")
        assert 0.7 < right < 0.95
        assert wrong < 0.01
    away = [decide([e], [Bound("below", 0)]) for e in made]
    assert share(away, "does not hold") > 0.7
    assert share(away, "holds") < 0.01


def test_a_claim_on_every_cell_that_one_cell_breaks_is_rarely_said_to_hold() -> None:
    rng = np.random.default_rng(3)
    verdicts = []
    for _ in range(STUDIES):
        cells = [simulated(rng, e, **SPREADS["both"]) for e in (0.5, 0.5, 0.5, 0.0)]
        verdicts.append(decide(cells, [Bound("above", 0)] * 4))
    most = 0.025 + 3 * math.sqrt(0.025 * 0.975 / STUDIES)
    assert share(verdicts, "holds") < most


def test_a_claim_on_every_cell_that_is_true_is_rarely_said_not_to_hold() -> None:
    rng = np.random.default_rng(4)
    verdicts = []
    for _ in range(STUDIES):
        cells = [simulated(rng, 0.0, **SPREADS["seeds"]) for _ in range(8)]
        verdicts.append(decide(cells, [Bound("above", 0)] * 8))
    # At the bound itself; of eight cells at 2.5 % each, 18 % would be below it.
    assert share(verdicts, "does not hold") < 0.025 + 3 * math.sqrt(0.025 * 0.975 / STUDIES)


def test_a_claim_on_some_cells_allows_for_how_many_there_are() -> None:
    rng = np.random.default_rng(5)
    verdicts = []
    for _ in range(STUDIES):
        cells = [simulated(rng, 0.0, **SPREADS["seeds"]) for _ in range(8)]
        verdicts.append(decide(cells, [Bound("above", 0)] * 8, some=True))
    assert share(verdicts, "holds") < 0.025 + 3 * math.sqrt(0.025 * 0.975 / STUDIES)


def test_the_seeds_part_by_hand() -> None:
    one = np.ones(1)
    found = estimate([[Sums(np.array([v]), one)] for v in (1.0, 2.0, 6.0)])
    assert found.mean == 3
    assert found.error == pytest.approx(np.std([1, 2, 6], ddof=1) / math.sqrt(3))
    assert (found.freedom, found.seeds, found.units) == (2, 3, 1)
    low, high = found.interval() or (0, 0)
    assert high - 3 == pytest.approx(4.302653 * found.error, rel=1e-6)
    assert low == pytest.approx(6 - high)


def test_the_documents_part_is_that_of_a_mean_where_documents_weigh_the_same() -> None:
    values = np.random.default_rng(6).normal(0, 1, 20)
    found = estimate([[Sums(values, np.ones(20))]])
    assert found.mean == pytest.approx(values.mean())
    assert found.error == pytest.approx(values.std(ddof=1) / math.sqrt(20))
    assert found.freedom == pytest.approx(19)


def test_a_ratio_is_of_the_figures_and_above_0() -> None:
    weights = np.ones(10)
    first = [[Sums(np.full(10, v), weights)] for v in (3.0, 3.3, 2.7)]
    against = [[Sums(np.full(10, v), weights)] for v in (2.0, 2.0, 2.0)]
    found = estimate(first, against, ratio=True)
    assert found.value == pytest.approx((3.0 * 3.3 * 2.7) ** (1 / 3) / 2)
    low, high = found.interval() or (0, 0)
    assert 0 < low < found.value < high
    assert found.value / low == pytest.approx(high / found.value)


def test_a_ratio_of_which_little_is_known_has_finite_ends() -> None:
    wild = Estimate(1.0, 100.0, 1, True, 2, 1, 100.0, 0.0)
    low, high = wild.interval() or (1, 1)
    assert 0 < low < wild.value < high < math.inf
    assert math.isfinite(resolution(wild) or math.nan)


def test_documents_of_two_stores_are_not_paired() -> None:
    rng = np.random.default_rng(8)
    a, b = rng.normal(0, 1, 20), rng.normal(0, 2, 30)
    one = [[Sums(a, np.ones(20), "a")]]
    found = estimate(one, [[Sums(b, np.ones(30), "b")]])
    assert found.mean == pytest.approx(a.mean() - b.mean())
    variances = [a.var(ddof=1) / 20, b.var(ddof=1) / 30]
    assert found.error == pytest.approx(math.sqrt(sum(variances)))
    # Welch's degrees of freedom.
    assert found.freedom == pytest.approx(
        sum(variances) ** 2 / (variances[0] ** 2 / 19 + variances[1] ** 2 / 29)
    )
    same = estimate(one, [[Sums(a + 1, np.ones(20), "a")]])
    assert same.error == pytest.approx(0, abs=1e-12) or math.isnan(same.error)


def test_one_seed_decides_nothing() -> None:
    values = 10 + np.random.default_rng(9).normal(0, 1, 20)
    found = estimate([[Sums(values, np.ones(20), "a")]])
    low, _ = found.interval() or (0, 0)
    assert low > 5
    assert decide([found], [Bound("above", 5)]) == "not decided"


def test_what_nothing_is_known_of_decides_nothing_and_counts() -> None:
    made = Estimate(-1.0, 0.36, 5, False, 3, 20, 0.0, 0.36)
    assert decide([made], [Bound("above", 0)]) == "does not hold"
    two = [Bound("above", 0)] * 2
    assert decide([made, None], two) == "not decided"  # at the level of two
    assert decide([made._replace(mean=1.0), None], two) == "not decided"
    assert decide([made, None], two, some=True) == "not decided"


def test_documents_that_one_side_lacks_weigh_nothing() -> None:
    rng = np.random.default_rng(10)
    a, b = rng.normal(0, 1, 20), rng.normal(0, 1, 14)
    found = estimate([[Sums(a, np.ones(20), "s")]] * 2, [[Sums(b, np.ones(14), "s")]] * 2)
    assert found.mean == pytest.approx(a.mean() - b.mean())
    assert found.units == 20 and math.isfinite(found.error)


def test_one_document_that_holds_everything_gives_no_interval() -> None:
    first = [[Sums(np.array([1.0] + [0.0] * 9), np.ones(10), "s")]] * 2
    against = [[Sums(np.ones(10), np.ones(10), "s")]] * 2
    found = estimate(first, against, ratio=True)
    assert found.interval() is None and math.isfinite(found.error_units)


def test_equal_differences_but_for_rounding_are_equal() -> None:
    one = np.ones(1)
    first = [[Sums(np.array([n / 768]), one)] for n in (5, 7, 11)]
    against = [[Sums(np.array([n / 768]), one)] for n in (2, 4, 8)]
    assert estimate(first, against).interval() is None


def test_seeds_that_give_one_number_say_nothing_of_their_spread() -> None:
    found = estimate([[Sums(np.array([3.0]), np.ones(1))]] * 3)
    assert found.interval() is None
    assert decide([found], [Bound("above", 0)]) == "not decided"


def test_few_documents_give_no_interval_and_no_verdict() -> None:
    found = estimate([[Sums(np.arange(5.0), np.ones(5))], [Sums(np.arange(5.0), np.ones(5))]])
    assert found.interval() is None
    assert resolution(found) is None
    assert decide([found], [Bound("above", -100)]) == "not decided"


def test_one_seed_and_one_unit_give_no_interval() -> None:
    assert estimate([[Sums(np.ones(1), np.ones(1))]]).interval() is None


@pytest.mark.parametrize(
    ("mean", "bound", "ratio", "verdict"),
    [
        (1.0, Bound("above", 0.5), False, "holds"),
        (1.0, Bound("above", 1.5), False, "does not hold"),
        (1.0, Bound("above", 0.99), False, "not decided"),
        (1.0, Bound("below", 1.5), False, "holds"),
        (1.0, Bound("below", 0.5), False, "does not hold"),
        (0.1, Bound("within", 0.5), False, "holds"),
        (1.0, Bound("within", 0.5), False, "does not hold"),
        (0.5, Bound("within", 0.5), False, "not decided"),
        (math.log(1.1), Bound("within", 0.5), True, "holds"),
        (math.log(1 / 2), Bound("within", 0.5), True, "does not hold"),
        (math.log(2.0), Bound("above", 1.5), True, "holds"),
    ],
)
def test_bounds(mean: float, bound: Bound, ratio: bool, verdict: Verdict) -> None:
    made = Estimate(mean, 0.05, 50, ratio, 3, 20, 0.0, 0.05)
    assert decide([made], [bound]) == verdict

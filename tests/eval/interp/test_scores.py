"""Closed forms: scores of judges whose TPR and FPR are known."""

from __future__ import annotations

import numpy as np
import pytest

from bsc.eval.interp.aggregate import estimate, frequency_adjusted, latents_needed, summary
from bsc.eval.interp.questions import Answered, score
from bsc.eval.interp.sampling import Chosen, Design, choose
from bsc.eval.interp.scores import LatentScore


def answers(tpr: float, fpr: float, n: int, rng: np.random.Generator) -> list[Answered]:
    return [
        Answered(truth, int(rng.random() < rate), "ok") for truth, rate in ((1, tpr), (0, fpr))
        for _ in range(n)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("tpr", "fpr", "accuracy", "f1"),
    [(0.9, 0.1, 0.9, 0.9), (1.0, 1.0, 0.5, 2 / 3), (0.5, 0.5, 0.5, 0.5), (0.9, 0.5, 0.7, 0.75),
     (0.0, 0.0, 0.5, 0.0)],
)  # fmt: skip
def test_balanced_accuracy_and_f1(tpr: float, fpr: float, accuracy: float, f1: float) -> None:
    found = score(answers(tpr, fpr, 20_000, np.random.default_rng(0)), "fuzzing")
    assert found["balanced_accuracy"] == pytest.approx(accuracy, abs=0.01)
    assert found["f1"] == pytest.approx(f1, abs=0.01)
    assert found["low"] == found["high"] == found["score"]


def test_the_balance_of_the_excerpts_does_not_matter() -> None:
    rng = np.random.default_rng(0)
    uneven = answers(0.9, 0.5, 10_000, rng)[:-9_000]
    assert score(uneven, "fuzzing")["f1"] == pytest.approx(0.75, abs=0.03)


def test_there_is_no_score_from_one_side_alone() -> None:
    positives = [Answered(1, 1, "ok")] * 20
    lost = [Answered(0, None, "failed")] * 20
    found = score(positives + lost, "fuzzing")
    assert found["score"] is None and found["state"] == "failed" and "f1" not in found
    assert (found["low"], found["high"]) == (0.5, 1.0)


def test_lost_answers_move_no_score_and_widen_the_bounds() -> None:
    rng = np.random.default_rng(1)
    full = answers(0.8, 0.2, 200, rng)
    lost = [a._replace(answer=None, status="failed") if i % 4 == 0 else a
            for i, a in enumerate(full)]  # fmt: skip
    a, b = score(full, "detection"), score(lost, "detection")
    assert b["state"] == "ok" and b["statuses"] == {"failed": 100, "ok": 300}
    assert abs(a["score"] - b["score"]) < 0.04
    assert b["low"] <= a["score"] <= b["high"] and b["high"] - b["low"] == pytest.approx(0.25)


def test_auc_is_of_probabilities_alone() -> None:
    hard = [Answered(1, 1, "ok"), Answered(0, 0, "ok")] * 10
    assert "auc" not in score(hard, "fuzzing")
    soft = [Answered(t, 1, "ok", p) for t, p in ((1, 0.9), (1, 0.7), (0, 0.6), (0, 0.7))]
    # Every answer is yes; the probabilities still rank: pairs 1, 1, 1 and a tie.
    assert score(soft, "fuzzing")["auc"] == pytest.approx(3.5 / 4)
    assert score(soft, "fuzzing")["balanced_accuracy"] == 0.5


def test_intruder_accuracy() -> None:
    found = score([Answered(2, 2, "ok"), Answered(3, 1, "ok"), Answered(1, 1, "ok"),
                   Answered(1, None, "unparsable")], "intruder")  # fmt: skip
    assert found["accuracy"] == found["score"] == pytest.approx(2 / 3)
    assert (found["low"], found["high"]) == (0.5, 0.75)


def population(n: int = 20_000) -> tuple[np.ndarray, np.ndarray]:
    """Firings and true accuracies of a coder whose frequent latents are worse."""
    rng = np.random.default_rng(0)
    counts = (rng.pareto(1.3, n) * 60).astype(np.int64) + 30
    truth = np.clip(0.85 - 0.07 * np.log10(counts / 30) + 0.08 * rng.standard_normal(n), 0.5, 1)
    return counts, truth


def measured(truth: np.ndarray, rng: np.random.Generator, n: int = 20) -> tuple[np.ndarray, ...]:
    """What n excerpts of either kind show, and its standard error by smoothed shares."""
    right = rng.binomial(n, truth, size=(2, len(truth)))
    p = (right + 1) / (n + 2)
    return right.mean(axis=0) / n, np.sqrt((p * (1 - p) / (n + 2)).sum(axis=0)) / 2


@pytest.mark.parametrize("design", ["unweighted", "weighted"])
def test_intervals_hold_the_truth_as_often_as_they_say(design: str) -> None:
    """1,000 samples of 40 latents, with a census of the most frequent ones."""
    counts, truth = population()
    weights = np.ones(len(counts)) if design == "unweighted" else counts
    wanted = (weights * truth).sum() / weights.sum()
    rng = np.random.default_rng(0)
    inside, means = 0, []
    for seed in range(1_000):
        drawn: Design = getattr(choose(counts, 40, census=np.quantile(counts, 0.995), seed=seed),
                                design)  # fmt: skip
        value, noise = measured(truth[drawn.latent], rng)
        found = estimate(drawn, value, noise, seed=seed)
        means.append(found["mean"])
        inside += found["interval"][0] <= wanted <= found["interval"][1]
    assert 0.93 <= inside / 1_000 <= 0.97
    assert abs(np.mean(means) - wanted) < 4 * np.std(means) / np.sqrt(1_000) + 2e-4


def test_a_census_has_the_interval_of_its_excerpts() -> None:
    counts, truth = population(12)
    drawn = choose(counts, 50, census=1e9).weighted
    assert drawn.census.all()
    rng = np.random.default_rng(0)
    wanted = (counts * truth).sum() / counts.sum()
    inside = 0
    for seed in range(400):
        value, noise = measured(truth[drawn.latent], rng)
        low, high = estimate(drawn, value, noise, seed=seed)["interval"]
        inside += low <= wanted <= high
    assert inside / 400 >= 0.93


def test_below_eight_latents_there_is_no_interval() -> None:
    design = Design(np.arange(7), np.ones(7), np.zeros(7, bool), 100, 0.0)
    found = estimate(design, np.linspace(0.5, 1, 7), np.zeros(7))
    assert found["interval"] is None and found["mean"] == 0.75
    assert estimate(design, np.full(7, np.nan), np.zeros(7))["mean"] is None


def test_latents_needed_for_a_difference() -> None:
    """Of so many latents, four of five comparisons find a difference of 0.02."""
    sd = 0.12
    n = latents_needed(sd)
    rng = np.random.default_rng(0)
    a, b = rng.normal(0.70, sd, (2_000, n)), rng.normal(0.72, sd, (2_000, n))
    z = (b.mean(axis=1) - a.mean(axis=1)) / np.sqrt((a.var(axis=1) + b.var(axis=1)) / n)
    assert (z > 1.96).mean() == pytest.approx(0.8, abs=0.03)


def test_the_curve_of_a_population_of_two_steps() -> None:
    """Latents below a rate score 0.9, those above it 0.6."""
    counts = np.concatenate([np.full(400, 50), np.full(10, 5_000)])
    truth = np.where(counts < 1_000, 0.9, 0.6)
    drawn = choose(counts, 60, census=1_000).weighted
    curve = frequency_adjusted(drawn, truth[drawn.latent], np.zeros(len(drawn.latent)),
                               counts[drawn.latent] / 100_000)  # fmt: skip
    assert [p["rate"] for p in curve] == [0.0005, 0.05]
    assert curve[0]["score"] == pytest.approx(0.9)
    share = 400 * 50 / counts.sum()
    assert curve[0]["share"] == pytest.approx(share)
    assert curve[1]["score"] == pytest.approx(0.9 * share + 0.6 * (1 - share))
    assert curve[1]["share"] == 1


def test_bounds_hold_what_is_missing() -> None:
    counts = np.array([100, 100, 100, 700, 10])
    chosen = choose(counts, 50, census=1.0, min_firings=50)
    ok = LatentScore(
        state="ok", score=0.8, low=0.8, high=0.8, noise=0.01, excerpts=40, statuses={"ok": 40}
    )
    wide = ok.model_copy(update={"low": 0.7, "high": 0.9})
    none = LatentScore(state="failed", score=None, low=0.0, high=1.0, excerpts=40, statuses={})
    scores = {0: ok, 1: ok, 2: wide, 3: none}
    found = summary(scores, chosen, counts, 1_000, "score")
    assert found["weighted"]["mean"] == pytest.approx(0.8)
    assert found["weighted"]["coverage"] == pytest.approx(300 / 1_010)
    low, high = found["weighted"]["bounds"]
    assert low == pytest.approx((80 + 80 + 70) / 1_010)
    assert high == pytest.approx((80 + 80 + 90 + 700 + 10) / 1_010)
    assert found["unweighted"]["coverage"] == pytest.approx(3 / 5)
    nothing = summary(
        {}, Chosen(*(d._replace(left_out=0.0) for d in chosen)), counts, 1_000, "score"
    )
    assert nothing["weighted"]["bounds"] == [0, 1] and nothing["curve"] == []

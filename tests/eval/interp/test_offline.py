"""Scores without a language model, on latents whose cause is known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from bsc.eval.interp import predictability as module
from bsc.eval.interp.evidence import Excerpt, Texts
from bsc.eval.interp.overlap import overlap_answers, token_weights
from bsc.eval.interp.predictability import Contexts, contexts_of_tokens, predictability
from bsc.eval.interp.questions import intruder_groups
from bsc.eval.interp.scores import (
    OFFLINE_VERSION,
    AllMeans,
    Coverage,
    Mean,
    Offline,
    OfflineCoder,
    OverlapScores,
    PredictabilityScores,
    SampledMean,
)
from bsc.typed import write_typed
from tests.eval.interp import planted


@pytest.fixture(scope="module")
def where() -> Texts:
    return planted.texts(documents=300, tokens=250)


def contexts(where: Texts) -> Contexts:
    w = where.split_text
    return contexts_of_tokens(w.ids, w.doc_id, w.position, where.read, w.part)


def planted_masks(where: Texts) -> dict[str, NDArray[np.bool_]]:
    ids = where.split_text.ids
    rng = np.random.default_rng(99)
    word = ids == 20
    pair = np.zeros(len(ids), bool)
    pair[1:] = (ids[1:] == 2) & (ids[:-1] == 1)
    return {
        "word": word,
        "pair": pair,
        "position": where.split_text.position < 4,
        "after": np.concatenate([[False], word[:-1]]),
        "frequent": (ids < 3) | (rng.random(len(ids)) < 0.2),
        "noise": rng.random(len(ids)) < 0.02,
    }


def test_planted_latents_are_told_from_noise(where: Texts) -> None:
    masks = planted_masks(where)
    found = predictability(planted.code_of(list(masks.values())), contexts(where))
    auc = dict(zip(masks, found.auc, strict=True))
    accuracy = dict(zip(masks, found.balanced_accuracy, strict=True))
    for name in ("word", "pair", "position", "after"):
        # The next document begins after the word as well, and there it does not fire.
        assert auc[name] > 0.98 and accuracy[name] > 0.97, name
    # What words say of it, and no more: of the rows without one of the three, a fifth fires.
    ids = where.split_text.ids
    p = (ids < 3).mean()
    tpr = p / (p + 0.2 * (1 - p))
    assert accuracy["frequent"] == pytest.approx((tpr + 1) / 2, abs=0.03)
    assert abs(auc["noise"] - 0.5) < 0.06


def test_shuffled_latents_are_at_one_half(where: Texts) -> None:
    """120 latents of all rates whose firings are moved to other rows."""
    rng = np.random.default_rng(98)
    masks = [
        rng.permutation(where.split_text.ids < edge)
        for edge in (1, 3, 10) for _ in range(20)
    ] + [rng.permutation(where.split_text.ids == w) for w in range(5, 65)]  # fmt: skip
    found = predictability(planted.code_of(masks), contexts(where))
    for values in found:
        assert np.isfinite(values).all()
        error = values.std() / np.sqrt(len(values))
        assert abs(values.mean() - 0.5) < 4 * error and error < 0.01


def test_test_documents_teach_nothing(where: Texts) -> None:
    """A latent that fires on a word in the documents to test on alone has no score; one that fires
    on the word in the others alone is not predicted on noise."""
    c, ids = contexts(where), where.split_text.ids
    only_tests = (ids == 20) & (c.part == 2)
    rng = np.random.default_rng(99)
    turned = np.where(c.part == 2, rng.random(len(ids)) < 0.02, ids == 20)
    found = predictability(planted.code_of([only_tests, turned]), c)
    assert np.isnan(found.auc[0])
    assert abs(found.auc[1] - 0.5) < 0.06


def test_documents_are_on_one_side(where: Texts) -> None:
    part = contexts(where).part
    for document in range(300):
        assert len(set(part[where.split_text.doc_id == document])) == 1
    assert {0, 1, 2} == set(part)
    # The half to test on is that of the examples.
    assert np.array_equal(part == 2, where.test)


def test_rows_that_were_not_read_are_left_out(where: Texts) -> None:
    w = where.split_text
    read = np.zeros(len(w.ids), bool)
    read[: len(read) // 2] = True
    c = contexts_of_tokens(w.ids, w.doc_id, w.position, read, w.part)
    assert (c.part[len(read) // 2 :] == 3).all()
    # Nor does a text see another one before it.
    first = np.flatnonzero(w.position == 0)
    assert len(set(c.bucket[1, first])) == 1


def test_few_firings_have_no_score(where: Texts) -> None:
    mask = np.zeros(len(where.read), bool)
    mask[:: len(mask) // 20] = True
    found = predictability(planted.code_of([mask, np.zeros_like(mask), ~mask]), contexts(where))
    assert np.isnan(found.auc[:2]).all()


def test_the_regression_is_the_ridge_that_it_says() -> None:
    """Against scikit-learn's, of the same weights."""
    from sklearn.linear_model import LogisticRegression

    rng = np.random.default_rng(99)
    firing, silent = rng.normal(0.5, 1, (3, 80)), rng.normal(0, 1, (3, 240))
    own = module._regression(np.concatenate([firing, silent], axis=1), 80, 240)
    x = np.concatenate([firing, silent], axis=1).T
    y = np.repeat([1, 0], [80, 240])
    weight = np.repeat([1.0, 80 / 240], [80, 240])
    model = LogisticRegression(C=1 / module.RIDGE, tol=1e-8).fit(x, y, sample_weight=weight)
    assert np.allclose(own[:-1], model.coef_[0], atol=2e-3)
    assert own[-1] == pytest.approx(model.intercept_[0], abs=2e-3)


def intruders(where: Texts, mask: NDArray[np.bool_], latent: int = 0) -> float:
    material = planted.material(where, [mask])
    evidence = material.evidence(0)
    groups = []
    for seed in range(10):
        groups += intruder_groups(evidence, np.random.default_rng(seed))
    weights = token_weights(where, (*evidence.firing, *evidence.silent))
    return float(np.mean(overlap_answers(where, groups, weights)))


def test_overlap_finds_the_intruder_of_a_word_and_not_of_noise(where: Texts) -> None:
    assert intruders(where, where.split_text.ids == 20) > 0.95
    rng = np.random.default_rng(99)
    noise = [intruders(where, rng.random(len(where.read)) < 0.01) for _ in range(40)]
    # Sd of one latent, of four groups: 0.16.
    assert abs(np.mean(noise) - 0.2) < 0.1


def test_ties_are_shared(where: Texts) -> None:
    excerpts = [Excerpt(0, 5, (1,))] * 5
    answers = overlap_answers(where, [(excerpts, 2)], token_weights(where, excerpts))
    assert answers == [pytest.approx(0.2)]


def test_scores_of_the_run_are_written_and_merged(tmp_path: Path) -> None:
    from bsc.eval.interp.offline import LatentNumber, _with_other_coders

    def coder(x: int) -> OfflineCoder:
        mean = SampledMean(mean=None, interval=None, latents=0, sd=None, needed=None)
        plain = AllMeans(
            **dict.fromkeys(("unweighted", "weighted"), Mean(mean=None, interval=None))
        )
        return OfflineCoder(
            settings={"x": x},
            predictability=PredictabilityScores(
                latents=0, coverage=Coverage(unweighted=0.0, weighted=0.0), auc=plain,
                balanced_accuracy=plain,
            ),
            overlap=OverlapScores(unweighted=mean, weighted=mean, chance=0.2),
        )  # fmt: skip

    def scores(store: str, **coders: int) -> Offline:
        found = {name: coder(x) for name, x in coders.items()}
        return Offline(version=OFFLINE_VERSION, store_id=store, coders=found)

    write_typed(tmp_path / "offline.json", scores("s", a=0, b=2))
    (tmp_path / "scores-overlap.csv").write_text("coder,latent,score\na,1,0.1\nb,2,0.2\n")
    tables = {"overlap": [LatentNumber("a", 1, 9.0)]}
    merged = _with_other_coders(scores("s", a=1), tables, tmp_path)
    assert {n: c.settings["x"] for n, c in merged.coders.items()} == {"a": 1, "b": 2}
    assert tables["overlap"] == [("a", 1, 9.0), ("b", 2, 0.2)]
    # Of another store nothing is kept.
    assert list(_with_other_coders(scores("t", a=0), tables, tmp_path).coders) == ["a"]

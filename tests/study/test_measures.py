"""Figures by name are those of eval.json and of the scores."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

from bsc.errors import ConfigError
from bsc.eval.config import EvalConfig
from bsc.eval.evaluate import evaluate
from bsc.eval.evaluation import CoderFigures, read_evaluation
from bsc.eval.figures.intervals import ratio_intervals
from bsc.eval.interp.config import InterpConfig
from bsc.eval.interp.material import Materials
from bsc.eval.interp.offline import offline_scores
from bsc.eval.interp.scores import InterpFolder
from bsc.study.config import Contrast
from bsc.study.measures import Measures, mean_score
from bsc.study.subjects import Subject, subjects_of
from bsc.train.run import Run
from tests.conftest import capture_short, train_small


@pytest.fixture(scope="module")
def measured(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("measured")
    copy = train_small(capture_short(tiny_model, folder), folder / "runs")
    evaluate(copy, EvalConfig(ce_tokens=512, ablation_bins=0, ultra_ablations=0, probe_texts=12))
    scoring = InterpConfig(latents=4, min_firings=4)
    offline_scores(Materials(copy, scoring, store=None, model=None))
    return copy


def contrast(figure: str, **fields: Any) -> Contrast:
    return Contrast.model_validate({"figure": figure, "coders": {}} | fields)


def subject(run: Run, words: str = "skip_transcoder-continuous-k4") -> Subject:
    return next(s for s in subjects_of("main", run) if words in s.name)


def value(run: Run, figure: str, words: str = "skip_transcoder-continuous-k4", **f: Any) -> float:
    sums = Measures().sums(subject(run, words), contrast(figure, **f))
    assert sums is not None
    return sums.value


def figures(run: Run, words: str = "skip_transcoder-continuous-k4") -> CoderFigures:
    return read_evaluation(run).coders[subject(run, words).name]


@pytest.mark.parametrize(
    ("figure", "field"),
    [("fvu", "fvu"), ("kl", "kl"), ("delta_ce", "delta_ce"), ("l0", "l0"), ("bits", "bits"),
     ("fvu_values_removed", "fvu_binarised"), ("delta_ce_values_removed", "delta_ce_binarised"),
     ("fvu_quantised", "fvu_quantised"), ("dead", "dead"), ("ultra_per_token", "ultra_per_token")],
)  # fmt: skip
def test_figures_of_eval_json(measured: Run, figure: str, field: str) -> None:
    assert value(measured, figure) == pytest.approx(getattr(figures(measured), field), abs=1e-12)


def test_a_binary_code_is_its_own_quantised_one_and_has_no_values_to_remove(measured: Run) -> None:
    words = "skip_transcoder-binary-k4"
    assert value(measured, "fvu_quantised", words) == pytest.approx(figures(measured, words).fvu)
    with pytest.raises(ConfigError, match="its code has no values"):
        value(measured, "fvu_values_removed", words)


def test_sums_over_documents_give_the_interval_of_the_evaluation(measured: Run) -> None:
    sums = Measures().sums(subject(measured), contrast("delta_ce"))
    assert sums is not None
    found = ratio_intervals(sums.numerators[:, None], sums.weights)[0]
    assert found == pytest.approx(figures(measured).delta_ce_interval)


def test_counts_of_latents(measured: Run) -> None:
    own = figures(measured)
    assert value(measured, "dead_share") == own.dead / own.latents
    assert value(measured, "latents_above:0.1") == own.latents_above["0.1"]
    assert value(measured, "share_of_firings_above:0.1") == own.share_of_firings_above["0.1"]
    words = own.ultra[0].what.split()[0]
    assert value(measured, f"ultra:{words}") == sum(words in u.what for u in own.ultra) > 0
    with pytest.raises(ConfigError, match="rates are counted above"):
        value(measured, "latents_above:0.3")


def test_probes_are_over_classes(measured: Run) -> None:
    (probed,) = read_evaluation(measured).probing.values()
    own = probed.coders[subject(measured).name]
    assert value(measured, "probe") == pytest.approx(own["sae_bench"]["1"].accuracy)
    assert value(measured, "probe:mean:5") == pytest.approx(own["mean"]["5"].accuracy)
    sums = Measures().sums(subject(measured), contrast("probe"))
    assert sums is not None and len(sums.weights) == 8
    with pytest.raises(ConfigError, match="was not probed so"):
        value(measured, "probe:mean:3")


def test_scores_without_a_judge(measured: Run) -> None:
    offline = InterpFolder(measured).read_offline()
    assert offline is not None
    own = offline.coders[subject(measured).name]
    for weighted in (False, True):
        means = own.predictability.auc
        mean = (means.weighted if weighted else means.unweighted).mean
        assert value(measured, "predictability", weighted=weighted) == pytest.approx(mean)
        overlap = (own.overlap.weighted if weighted else own.overlap.unweighted).mean
        assert value(measured, "overlap", weighted=weighted) == pytest.approx(overlap)


def test_the_scores_of_a_run_are_read_once(measured: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    read = mock.Mock(side_effect=InterpFolder(measured).read_offline)
    monkeypatch.setattr(InterpFolder, "read_offline", lambda folder: read())
    every = Measures()
    for figure in ("predictability", "overlap"):
        assert every.sums(subject(measured), contrast(figure)) is not None
    assert read.call_count == 1


def test_training_figures(measured: Run) -> None:
    one = subject(measured)
    fvu = [line["fvu"] for line in measured.metrics() if line["coder"] == one.name]
    later = fvu[len(fvu) // 10 :]
    worst = max(later[i] / min(later[: i + 1]) for i in range(len(later)))
    assert value(measured, "spike") == pytest.approx(worst)
    assert value(measured, "non_finite") == 0


SCORE = np.array([0.9, 0.5, np.nan, 0.7, np.nan])
COUNTS = np.array([10, 80, 40, 20, 0])


@pytest.mark.parametrize(
    ("fields", "mean"),
    [
        ({}, 0.7),
        ({"weighted": True}, (9 + 40 + 14) / 110),
        ({"unscored": 0.5}, (0.9 + 0.5 + 0.5 + 0.7) / 4),
        ({"unscored": 0.5, "weighted": True}, (9 + 40 + 20 + 14) / 150),
        ({"ranks": [0, 0.25]}, 0.5),  # the most frequent of the four that fire
        ({"ranks": [0.25, 1]}, 0.8),
        ({"rates": [0, 0.5]}, 0.8),  # of 100 rows
        ({"rates": [0.15, 0.5], "weighted": True}, 0.7),
    ],
)
def test_which_latents_count_and_how(fields: dict[str, Any], mean: float) -> None:
    sums = mean_score(SCORE, COUNTS, 100, contrast("predictability", **fields))
    assert sums is not None
    assert sums.value == pytest.approx(mean)


def test_where_no_latent_has_a_score_there_is_none() -> None:
    assert mean_score(SCORE, COUNTS, 100, contrast("predictability", rates=[0.3, 0.5])) is None

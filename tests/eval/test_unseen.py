"""Figures without held-out rows that were seen in training, recomputed from the rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bsc.cache.capture.capture import capture
from bsc.cache.capture.config import CaptureConfig
from bsc.cache.model.text import parse_text
from bsc.cache.model.text_source import TextSource
from bsc.cache.store.store import ActivationStore
from bsc.eval.config import EvalConfig
from bsc.eval.evaluate import evaluate
from bsc.eval.passes.context_pass import CLEAN, joined, pass_over_contexts
from bsc.eval.passes.contexts import contexts_of
from bsc.eval.passes.setting import matching_model
from bsc.eval.passes.splice import coder_replacement
from bsc.train.config import TrainConfig
from bsc.train.run import Run
from bsc.train.trainer import train_sweep

HOOK = "layers.2.mlp"


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, dict[str, Any]]:
    """An evaluated run on documents of which each holds the same notice."""
    rng = np.random.default_rng(0)
    words = [f"{a}{b}" for a in "bcdfglmnprst" for b in ("ake", "ine", "ort", "ull", "and")]

    def sentence() -> str:
        return " ".join(rng.choice(words, size=9)) + "."

    notice = " ".join(sentence() for _ in range(3))
    folder = tmp_path_factory.mktemp("unseen")
    lines = [f"{sentence()} {sentence()} {notice} {sentence()} {sentence()}" for _ in range(250)]
    (folder / "t.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in lines))
    capture(CaptureConfig(
        model="demo", store=folder / "acts", hookpoints=(HOOK,), context=128, tokens=20_480,
        held_out_tokens=4_096,
        text=TextSource(held_out=0.2, **parse_text([str(folder / "t.jsonl")])),
    ))  # fmt: skip
    run, _ = train_sweep(TrainConfig(
        store=folder / "acts", runs=folder / "runs", batch_rows=512,
        coders=({"code": ["binary", "continuous"], "k": 8, "n_latents": 256},),
    ))  # fmt: skip
    config = EvalConfig(ablation_bins=0, ultra_ablations=0, probes=())
    return run, evaluate(run, config).to_json()


def test_fvu_of_the_other_rows_is_that_of_the_rows(found: tuple[Run, dict[str, Any]]) -> None:
    run, evaluation = found
    store = ActivationStore(run.config()["store"])
    seen = store.seen_rows()
    assert seen is not None and 0.1 < seen.mean() < 0.6
    assert evaluation["overlap"] == store.overlap
    split = store.held_out
    x, y = (
        torch.cat([split.tensor(f"{HOOK}/{side}", i) for i in range(split.shards)]).double()
        for side in ("input", "output")
    )
    new = torch.from_numpy(~seen)
    for name in run.coder_names():
        coder = run.coder(name)
        error = (coder(x.float()).double() - y).square().sum(1)
        deviation = (y - y.mean(0)).square().sum(1)
        figures = evaluation["coders"][name]
        assert figures["rows_unseen"] == int(new.sum())
        assert figures["fvu"] == pytest.approx(float(error.sum() / deviation.sum()), rel=1e-4)
        expected = float(error[new].sum() / deviation[new].sum())
        assert figures["fvu_unseen"] == pytest.approx(expected, rel=1e-4)
        assert abs(figures["fvu_unseen"] - figures["fvu"]) > 1e-3  # the notice is easy, or hard
        low, high = figures["fvu_unseen_interval"]
        assert low < figures["fvu_unseen"] < high


def test_losses_of_the_other_tokens_are_those_of_a_pass_over_them(
    found: tuple[Run, dict[str, Any]],
) -> None:
    run, evaluation = found
    store = ActivationStore(run.config()["store"])
    lm = matching_model(store, None, torch.device("cpu"))
    contexts = contexts_of(store, 100_000)
    assert 0.1 < 1 - contexts.unseen.mean() < 0.6
    only = contexts._replace(predicted=contexts.predicted & contexts.unseen)
    for name in run.coder_names():
        variants = {name: {HOOK: coder_replacement(run.coder(name))}}
        sums = joined(pass_over_contexts(lm, only, variants), contexts.documents)
        added = (sums[name].nats - sums[CLEAN].nats).sum()
        expected = added / only.counts.sum()
        figures = evaluation["coders"][name]
        assert figures["delta_ce_unseen"] == pytest.approx(expected, rel=1e-3, abs=1e-6)
        assert figures["delta_ce_unseen"] != pytest.approx(figures["delta_ce"], rel=1e-6)
    assert evaluation["predicted_unseen"] == only.counts.sum() < evaluation["predicted_tokens"]


def test_where_it_is_not_known_what_was_seen_there_are_no_such_figures(
    found: tuple[Run, dict[str, Any]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run, _ = found
    monkeypatch.setattr(ActivationStore, "overlap", None)
    config = EvalConfig(ablation_bins=0, ultra_ablations=0, probes=(), ce_tokens=1_000)
    figures = evaluate(run, config)["coders"]
    assert not [k for f in figures.values() for k in f if "unseen" in k]

"""The control with untrained weights: captured, trained on, evaluated and marked in the report."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from bsc.cache.capture.capture import capture
from bsc.cache.capture.config import CaptureConfig
from bsc.cache.model.models import load_model
from bsc.cache.model.text_source import TextSource
from bsc.cache.store.store import ActivationStore
from bsc.errors import StoreError
from bsc.eval.config import EvalConfig
from bsc.eval.evaluate import evaluate
from bsc.eval.passes.setting import matching_model
from bsc.eval.report.report import render_report
from bsc.train.config import TrainConfig
from bsc.train.run import Run
from bsc.train.trainer import train_sweep

FAST = EvalConfig(ce_tokens=512, ablation_bins=0, ultra_ablations=0, probes=())


def test_a_seed_gives_the_same_weights_with_and_without_the_head(tiny_model: Path) -> None:
    state = torch.random.get_rng_state()
    one, two = (
        load_model(str(tiny_model), random_weights=3, with_head=head) for head in (True, False)
    )
    assert torch.equal(torch.random.get_rng_state(), state)
    assert one.identity() == two.identity() and one.identity()["random_weights"] == 3
    trained, other = load_model(str(tiny_model)), load_model(str(tiny_model), random_weights=4)
    hashes = {m.identity()["weights_sha256"] for m in (one, trained, other)}
    assert len(hashes) == 3 and "random_weights" not in trained.identity()
    assert one.model.dtype == trained.model.dtype


def test_the_control_goes_through_every_stage(
    tiny_model: Path, tmp_path: Path, evaluated: Run
) -> None:
    config = CaptureConfig(
        model=str(tiny_model), store=tmp_path / "acts", hookpoints=("layers.2.mlp",),
        text=TextSource(corpus="stdlib", held_out=0.2), tokens=3_000, held_out_tokens=1_000,
        context=32, batch_tokens=512, random_weights=1,
    )  # fmt: skip
    capture(config)
    store = ActivationStore(tmp_path / "acts")
    assert store.attributes["model"]["random_weights"] == 1
    run, _ = train_sweep(
        TrainConfig(
            store=tmp_path / "acts", runs=tmp_path, name="control", tokens=3_000, batch_rows=256,
            coders=({"k": 4, "n_latents": 64},),
        )
    )  # fmt: skip
    found = evaluate(run, FAST)
    (figures,) = found["coders"].values()
    # Of a model that was captured as another one, these rows would not be reconstructed at all.
    assert figures["fvu"] < 1 and np.isfinite(figures["delta_ce"])
    page = render_report([evaluated, run])
    assert "control is of this model with untrained weights (seed 1)" in page
    assert "untrained model (seed 1)" in page
    store.attributes["model"]["random_weights"] = 2
    with pytest.raises(StoreError, match="weights_sha256"):
        matching_model(store, None, torch.device("cpu"))

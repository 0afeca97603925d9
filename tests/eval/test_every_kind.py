"""Coders of every selection, code and surrogate go through evaluation and report."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bsc.eval.config import EvalConfig
from bsc.eval.evaluate import evaluate
from bsc.eval.report.report import render_report
from bsc.train.config import TrainConfig
from bsc.train.run import Run
from bsc.train.trainer import train_sweep
from tests.raw import raw

BASE = {"hookpoint": "layers.2.mlp", "k": 4, "n_latents": 64}
TABLES = (
    {"code": ["binary", "continuous", "hybrid"], "select": ["topk", "groupmax", "batch_topk"]},
    {"code": "binary", "surrogate": "gumbel", "select": "groupmax"},
    {"code": "binary", "exact_k": True},
    {"site": "sae", "code": "binary", "amplitude": "learned"},
)


@pytest.mark.slow
def test_every_kind_of_coder_is_evaluated_and_reported(
    store_path: Path, tmp_path: Path, small: EvalConfig
) -> None:
    run, summaries = train_sweep(
        TrainConfig(
            store=store_path, runs=tmp_path, tokens=12_000, batch_rows=256, eval_rows=2_000,
            coders=tuple(BASE | t for t in TABLES),
        )
    )  # fmt: skip
    evaluate(run, small)
    found = raw(Run.open(run.folder).eval_path)
    figures = found["coders"]
    assert len(figures) == 12
    for summary in summaries:
        f = figures[summary.name]
        assert summary.held_out_fvu is not None
        # Training evaluated about the same rows, in its own units.
        assert abs(f["fvu"] / summary.held_out_fvu - 1) < 0.25, (summary.name, f["fvu"])
        config = run.coder(summary.name).config
        if config.exact_k or config.surrogate == "gumbel":
            assert f["l0"] == 4.0
        elif config.select != "batch_topk":
            assert f["l0"] <= 4.0
        else:
            assert 0.5 < f["l0"] < 12
    page = render_report([run])
    assert all(name in page for name in figures) and "hybrid" in page


def test_a_saved_coder_of_batch_topk_does_not_look_at_its_company(
    store_path: Path, tmp_path: Path
) -> None:
    run, _ = train_sweep(
        TrainConfig(
            store=store_path, runs=tmp_path, tokens=12_000, batch_rows=256,
            coders=(BASE | {"code": "hybrid", "select": "batch_topk"},),
        )
    )  # fmt: skip
    coder = run.coder(run.coder_names()[0])
    assert coder.select_threshold.shape == (2,)
    x = torch.randn(200, 32) * 3
    torch.testing.assert_close(coder(x)[:7], coder(x[:7]))

"""A run is measured on a text that it was not trained on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from bsc.cache.capture.capture import capture
from bsc.cache.capture.config import CaptureConfig
from bsc.cache.model.text_source import TextSource
from bsc.cli import main
from bsc.errors import UserError
from bsc.eval.config import EvalConfig
from bsc.eval.elsewhere import run_on
from bsc.eval.evaluate import evaluate
from bsc.eval.report.report import render_report
from bsc.train.run import Run
from tests.conftest import make_model


def other_store(model: Path, folder: Path) -> Path:
    capture(
        CaptureConfig(
            model=str(model), store=folder, hookpoints=("layers.2.mlp",), tokens=1_000,
            text=TextSource(corpus="stdlib", held_out=0.5, seed=3), held_out_tokens=1_000,
            context=32, batch_tokens=512,
        )
    )  # fmt: skip
    return folder


def test_figures_on_another_text_stand_beside_those_of_the_run(
    evaluated_copy: Run, tiny_model: Path, small: EvalConfig, tmp_path: Path
) -> None:
    before = evaluated_copy.eval_path.read_bytes()
    store = other_store(tiny_model, tmp_path / "other")
    there = run_on(evaluated_copy, store)
    found = evaluate(there, small)
    assert evaluated_copy.eval_path.read_bytes() == before
    assert there.folder.parent == evaluated_copy.folder / "on"
    own = json.loads(before)
    assert found["store_id"] != own["store_id"] and found["coders"].keys() == own["coders"].keys()
    # Of other rows: other figures; and nothing is said of what was seen in training.
    assert all(found["coders"][n]["fvu"] != own["coders"][n]["fvu"] for n in own["coders"])
    assert found["overlap"] is None and own["overlap"] is not None
    page = render_report([Run.open(there.folder)])
    assert f"trained on store {own['store_id']}, and are measured on store" in page
    # The same again goes on; the folder may be moved as a whole.
    assert evaluate(run_on(evaluated_copy, store), small)["coders"] == found["coders"]
    moved = shutil.move(evaluated_copy.folder, tmp_path / "moved")
    assert Run.open(Path(moved) / "on" / there.folder.name).coder("binary-k8").config.k == 8


def test_what_does_not_belong_together_is_refused(
    run: Run, store_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = Run(Path(shutil.copytree(run.folder, tmp_path / "run")))
    with pytest.raises(UserError, match="the store that the run was trained on"):
        run_on(copy, store_path)
    another = other_store(make_model(tmp_path / "m", num_hidden_layers=4), tmp_path / "acts")
    with pytest.raises(UserError, match="captured from another model than the run's: weights"):
        run_on(copy, another)
    with pytest.raises(SystemExit) as done:
        main(["eval", str(copy.folder), "--on", str(another), "--store", str(store_path)])
    assert done.value.code == 2 and "give one" in capsys.readouterr().err
    assert not (copy.folder / "on").exists()

"""The folder of a run: who holds it, and what is left of one that never began."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from bsc.describe import describe
from bsc.errors import StoreError, UserError
from bsc.records import write_record
from bsc.train.resume import resume
from bsc.train.run import Run, claim
from bsc.train.run_config import RunConfig
from bsc.train.trainer import train_sweep
from bsc.typed import parse_typed
from tests.raw import raw
from tests.train.sweeps import CODERS, config


def test_a_run_in_use_is_refused(store_path: Path, tmp_path: Path) -> None:
    run, _ = train_sweep(config(store_path, tmp_path, tokens=2_560, coders=CODERS[:1]))
    with claim(run.folder), pytest.raises(UserError, match="in use"):
        resume(run.folder, {"tokens": 5_120})
    resume(run.folder, {"tokens": 5_120})


def test_a_run_that_was_killed_before_its_config_was_written_can_begin_again(
    store_path: Path, tmp_path: Path
) -> None:
    sweep = config(store_path, tmp_path, tokens=2_560, coders=CODERS[:1])
    sweep.folder.mkdir()
    (sweep.folder / ".lock").write_text("process 1 on elsewhere")
    (sweep.folder / "config.json.123.partial").write_text("{")
    with claim(sweep.folder), pytest.raises(UserError, match="is being trained now"):
        train_sweep(sweep)
    (sweep.folder / ".lock").touch()
    run, _ = train_sweep(sweep)
    assert {p.name for p in run.folder.iterdir()} == {
        "config.json", "metrics.jsonl", "checkpoint", "coders",
    }  # fmt: skip


def test_figures_on_other_stores_go_with_those_of_the_run(run: Run, tmp_path: Path) -> None:
    copy = Run(Path(shutil.copytree(run.folder, tmp_path / "run")))
    other = Run(copy.folder / "on" / "text")
    other.interp_folder.mkdir(parents=True)
    other.eval_path.write_text("{}")
    ledger = other.interp_folder / "ledger.jsonl"
    ledger.write_text("{}\n")
    copy.remove_figures()
    assert not other.eval_path.exists() and ledger.exists()  # answers were paid for


def test_info_on_an_interrupted_run_of_several_processes(run: Run, tmp_path: Path) -> None:
    copy = Run(Path(shutil.copytree(run.folder, tmp_path / "run")))
    record = raw(copy.config_path) | {"world": 2}
    del record["completed"]
    write_record(copy.config_path, record)
    for rank, step in enumerate((30, 20)):
        folder = copy.part(rank, 2) / "checkpoint"
        folder.mkdir(parents=True)
        (folder / "latest.json").write_text(json.dumps({"folder": f"{step:09d}"}))
    found = describe(copy.folder)
    assert found["rows"] == 20 * record["batch_rows"] and found["processes"] == 2
    assert found["go_on"].endswith("--rank R --world 2")


def test_the_config_of_hundreds_of_coders_is_checked_once(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = raw(run.config_path)
    record["coders"] = [record["coders"][0] | {"name": f"layers.2.mlp/{i}"} for i in range(300)]
    write_record(tmp_path / "config.json", record)
    checked: list[object] = []

    def counted(kind: Any, value: Any, *rest: Any) -> Any:
        checked.append(value)
        return parse_typed(kind, value, *rest)

    monkeypatch.setattr("bsc.train.run.parse_typed", counted)
    assert len([Run(tmp_path).config() for _ in range(5)]) == 5 and len(checked) == 1
    record["coders"].pop()
    write_record(tmp_path / "config.json", record)
    assert len(Run(tmp_path).coder_names()) == 299 and len(checked) == 2


@pytest.mark.parametrize("names", [["a/b", "a/b/config.json"], ["./a"], ["a//b"], ["x" * 300]])
def test_names_of_coders_that_would_collide_on_a_disk_are_none(run: Run, names: list[str]) -> None:
    whole = run.config().to_json()
    whole["coders"] = [whole["coders"][0] | {"name": name} for name in names]
    with pytest.raises(StoreError, match="not of the form"):
        parse_typed(RunConfig, whole, "config.json")

"""A run of finetuning that is killed at any instant and resumed ends with the same bytes."""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from bsc.errors import UserError
from bsc.finetuning.config import FinetuneConfig
from bsc.finetuning.finetune import finetune, resume_finetune
from bsc.finetuning.step import Stepper
from bsc.train.checkpoint import checkpoint_step
from bsc.train.run import Run
from bsc.train.run_config import RunConfig
from bsc.typed import parse_typed, write_typed

STEPS = 14


def config(runs: Path, **fields: Any) -> FinetuneConfig:
    """Two passes over little text, a checkpoint after each step."""
    return FinetuneConfig(
        **{
            "runs": runs, "name": "run", "tokens": STEPS * 256, "batch_tokens": 256, "lr": 3e-3,
            "checkpoint_every": 1, "log_every": 2, "loss": "kl+fvu", **fields,
        }
    )  # fmt: skip


@pytest.fixture(scope="module")
def whole(parents: Run, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The run that is never interrupted."""
    return finetune(parents, config(tmp_path_factory.mktemp("whole")))[0]


def same_bytes(a: Run, b: Run) -> None:
    assert a.coder_names() == b.coder_names()
    for name in a.coder_names():
        for file in ("coder.safetensors", "config.json"):
            x, y = ((r.coder_folder(name) / file).read_bytes() for r in (a, b))
            assert x == y, (name, file)
    lines = [[{k: v for k, v in m.items() if k != "seconds"} for m in r.metrics()] for r in (a, b)]
    assert lines[0] == lines[1]


@pytest.mark.parametrize("optimiser", ["adam", "signum", "muon"])
def test_stopped_and_resumed_it_ends_with_the_same_bytes(
    parents: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimiser: Any
) -> None:
    """Stopped after some steps, without a checkpoint of the last one."""
    fields = {"optimiser": optimiser, "checkpoint_every": 3}
    straight, _ = finetune(parents, config(tmp_path / "whole", **fields))

    class Killed(BaseException):
        pass

    real = Stepper.step
    calls, limit = 0, 5

    def step(self: Any, *args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > limit:
            raise Killed
        return real(self, *args)

    monkeypatch.setattr(Stepper, "step", step)
    with pytest.raises(Killed):
        finetune(parents, config(tmp_path, **fields))
    assert checkpoint_step(tmp_path / "run" / "checkpoint") == 3
    calls, limit = 0, 6
    with pytest.raises(Killed):
        resume_finetune(tmp_path / "run")
    assert checkpoint_step(tmp_path / "run" / "checkpoint") == 9
    calls, limit = 0, 100
    run, _ = resume_finetune(tmp_path / "run")
    assert calls == STEPS - 9
    same_bytes(run, straight)


def _work(parents: Path, settings: FinetuneConfig) -> None:
    assert settings.runs is not None
    folder = settings.runs / settings.name
    if (folder / "config.json").exists():
        resume_finetune(folder)
    else:
        finetune(parents, settings)


@pytest.mark.slow
def test_killed_at_twelve_instants_it_ends_with_the_same_bytes(
    parents: Run, tmp_path: Path, whole: Run
) -> None:
    """Real SIGKILLs. The processes are forked from one that has imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["bsc.finetuning.finetune", "transformers"])
    rng = random.Random(0)
    kills, runs, seconds, before = 0, 0, 3.0, 0
    while True:
        settings = config(tmp_path, name=f"run-{runs}")
        folder = tmp_path / settings.name
        process = context.Process(target=_work, args=(parents.folder, settings))
        process.start()
        process.join(600 if kills >= 12 else seconds * rng.uniform(0.5, 1.5))
        if process.exitcode is None:
            os.kill(process.pid or 0, signal.SIGKILL)
            process.join()
            kills += 1
            step = checkpoint_step(folder / "checkpoint")
            # Slow machines must get somewhere between two kills, fast ones not to the end.
            seconds *= 1.2 if step <= before else 0.8 if step > before + 3 else 1.0
            before = max(step, before)
            continue
        assert process.exitcode == 0
        same_bytes(Run.open(folder), whole)
        if kills >= 12:
            break
        runs, before = runs + 1, 0  # it got to its end between two kills: another one


def test_what_cannot_be_resumed(parents: Run, tmp_path: Path, whole: Run) -> None:
    copied = Path(shutil.copytree(whole.folder, tmp_path / "run"))
    with pytest.raises(UserError, match="this run is complete"):
        resume_finetune(copied)
    with pytest.raises(UserError, match="not a run of finetuned coders; `bsc train --resume"):
        resume_finetune(parents.folder)
    with pytest.raises(UserError, match="no such run"):
        resume_finetune(tmp_path / "nowhere")


def test_a_run_goes_on_as_it_began(
    parents: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = Run(Path(shutil.copytree(parents.folder, tmp_path / "parents")))

    def stop(self: Any, *args: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Stepper, "step", stop)
        with pytest.raises(KeyboardInterrupt):
            finetune(own, config(tmp_path))
    with pytest.raises(UserError, match="a run that has not ended is here"):
        finetune(own, config(tmp_path))
    saved = Run(tmp_path / "run").config()
    assert saved.finetuned is not None and Path(saved.store).is_absolute()
    with pytest.raises(UserError, match=r"lr is 0\.1, but the run has 0\.003"):
        resume_finetune(tmp_path / "run", {"lr": 0.1})
    # A run of before both parts of the loss could be weighed has no such setting: they weigh alike.
    asked = saved.to_json()
    asked["finetuned"]["config"].pop("fvu_weight")
    old = Run(Path(shutil.copytree(tmp_path / "run", tmp_path / "old")))
    write_typed(old.config_path, parse_typed(RunConfig, asked, old.config_path))
    with pytest.raises(UserError, match=r"fvu_weight is 3\.0, but the run has 1\.0"):
        resume_finetune(old.folder, {"fvu_weight": 3.0})
    with monkeypatch.context() as patched:
        patched.setattr(Stepper, "step", stop)
        with pytest.raises(KeyboardInterrupt):  # gone on with, as the run that has the setting
            resume_finetune(old.folder)
    coder = own.coder(own.coder_names()[0])
    coder.tensors["b_dec"] += 1
    coder.save(own.coder_folder(own.coder_names()[0]))
    with pytest.raises(UserError, match="is not the coder that this run began with"):
        resume_finetune(tmp_path / "run")


def test_a_store_that_was_moved_is_named_once(
    parents: Run, store_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run goes on with the store that it began with, though its parent knows another place."""
    moved = Path(shutil.copytree(store_path, tmp_path / "moved"))
    own = Run(Path(shutil.copytree(parents.folder, tmp_path / "parents")))
    gone = own.config().to_json() | {"store": str(tmp_path / "gone")}
    write_typed(own.config_path, parse_typed(RunConfig, gone, own.config_path))

    def stop(self: Any, *args: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Stepper, "step", stop)
        with pytest.raises(KeyboardInterrupt):
            finetune(own, config(tmp_path, tokens=512), store=moved)
    run, _ = resume_finetune(tmp_path / "run")
    assert run.config().store == str(moved)

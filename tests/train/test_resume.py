"""A run that is killed at any instant and resumed ends with the same bytes."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
from pathlib import Path
from typing import Any

import pytest

from bsc.errors import ConfigError, StoreError, UserError
from bsc.eval.config import EvalConfig
from bsc.eval.evaluate import evaluate
from bsc.eval.evaluation import EvaluationFolder
from bsc.train import checkpoint, loop
from bsc.train.coders.coder import SparseCoder
from bsc.train.config import TrainConfig
from bsc.train.metrics import MetricsWriter
from bsc.train.resume import resume
from bsc.train.run import Run
from bsc.train.trainer import train_sweep
from tests.raw import raw
from tests.train.sweeps import CODERS, config


@pytest.fixture(scope="module")
def whole(store_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The run that is never interrupted."""
    run, _ = train_sweep(config(store_path, tmp_path_factory.mktemp("whole")))
    return run


def same_bytes(a: Run, b: Run) -> None:
    assert a.coder_names() == b.coder_names()
    for name in a.coder_names():
        for file in ("coder.safetensors", "config.json"):
            x, y = ((r.coder_folder(name) / file).read_bytes() for r in (a, b))
            assert x == y, (name, file)
    lines = [
        [
            {k: v for k, v in m.items() if k not in ("seconds", "waiting_for_data")}
            for m in r.metrics()
        ]
        for r in (a, b)
    ]
    assert lines[0] == lines[1]


def _train(sweep: TrainConfig) -> None:
    if (sweep.folder / "config.json").exists():
        resume(sweep.folder)
    else:
        train_sweep(sweep)


@pytest.mark.slow
def test_killed_at_twenty_instants_it_ends_with_the_same_bytes(
    store_path: Path, tmp_path: Path, whole: Run
) -> None:
    """Real SIGKILLs. The processes are forked from one that has imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["bsc.train.resume"])
    rng = random.Random(0)
    kills, runs, seconds, before = 0, 0, 0.4, 0
    while True:
        sweep = config(store_path, tmp_path, name=f"run-{runs}")
        process = context.Process(target=_train, args=(sweep,))
        process.start()
        process.join(600 if kills >= 20 else seconds * rng.uniform(0.5, 1.5))
        if process.exitcode is None:
            os.kill(process.pid or 0, signal.SIGKILL)
            process.join()
            kills += 1
            step = _step(sweep.folder)
            # Slow machines must get somewhere between two kills, fast ones not to the end.
            seconds *= 1.2 if step <= before else 0.8 if step > before + 4 else 1.0
            before = max(step, before)
            continue
        assert process.exitcode == 0
        same_bytes(Run.open(sweep.folder), whole)
        if kills >= 20:
            break
        runs, before = runs + 1, 0  # it got to its end between two kills: another one


def _step(folder: Path) -> int:
    try:
        found = checkpoint.load_checkpoint(folder / "checkpoint")
    except StoreError:  # it is being replaced
        return -1
    return int(found.state["step"]) if found else 0


def test_stopped_between_any_two_writes_of_a_checkpoint_it_ends_with_the_same_bytes(
    store_path: Path, tmp_path: Path, whole: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every write of the third checkpoint fails once; an exception stands for the kill."""

    class Killed(BaseException):
        pass

    steps = ("make_durable_folder", "write_json", "write_tensors", "fsync_folder")
    reals = {name: getattr(checkpoint, name) for name in steps}
    calls, limit = [0], [0]

    def counted(name: str) -> Any:
        def call(*args: Any, **how: Any) -> Any:
            calls[0] += 1
            if calls[0] == limit[0]:
                if name == "write_tensors":  # half a file
                    Path(args[0]).write_bytes(b"\x10\0\0")
                raise Killed
            return reals[name](*args, **how)

        return call

    for name in steps:
        monkeypatch.setattr(checkpoint, name, counted(name))
    per_checkpoint = 10  # folder, state, seven coders, the folder above
    sweep = config(store_path, tmp_path, tokens=2_000)
    reference, _ = train_sweep(sweep.model_copy(update={"name": "reference"}))
    for at in range(per_checkpoint):
        calls[0], limit[0] = 0, 2 * per_checkpoint + at + 1
        mine = sweep.model_copy(update={"name": f"killed-{at}"})
        with pytest.raises(Killed):
            train_sweep(mine)
        assert calls[0] == limit[0]
        limit[0] = 0
        run, _ = resume(mine.folder)
        same_bytes(run, reference)


def test_the_checkpoint_of_the_last_step_is_not_written_over_itself(
    store_path: Path, tmp_path: Path
) -> None:
    """A kill in the middle of that would leave none. Step 10 is due, and it is the end."""
    run, _ = train_sweep(config(store_path, tmp_path, tokens=2_560, coders=CODERS[:1]))
    folder = run.folder / "checkpoint"
    assert [p.name for p in folder.iterdir() if p.is_dir()] == ["000000010"]
    with pytest.raises(AssertionError, match="never written over"):
        checkpoint.save_checkpoint(folder, 10, {}, [])


def test_it_goes_on_from_a_checkpoint_and_not_from_the_beginning(
    store_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = config(store_path, tmp_path, tokens=2_560)
    real = loop.Loop._step
    taken = []

    def stop_at_7(self: loop.Loop, batch: Any) -> None:
        taken.append(self.step)
        if self.step == 7 and len(taken) == 8:
            raise RuntimeError("power cut")
        real(self, batch)

    monkeypatch.setattr(loop.Loop, "_step", stop_at_7)
    with pytest.raises(RuntimeError):
        train_sweep(sweep)
    resume(sweep.folder)
    assert taken == [*range(8), *range(6, 10)]


def test_ctrl_c_finishes_the_step_and_writes_a_checkpoint(
    store_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    sweep = config(store_path, tmp_path, tokens=2_560, checkpoint_every=1000)
    real = loop.Loop._step

    def interrupted(self: loop.Loop, batch: Any) -> None:
        if self.step == 4:
            os.kill(os.getpid(), signal.SIGINT)
        real(self, batch)

    monkeypatch.setattr(loop.Loop, "_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train_sweep(sweep)
    monkeypatch.setattr(loop.Loop, "_step", real)
    assert _step(sweep.folder) == 5
    assert "--resume" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"has not ended.*--resume"):
        train_sweep(sweep)
    reference, _ = train_sweep(sweep.model_copy(update={"name": "reference"}))
    run, _ = resume(sweep.folder)
    same_bytes(run, reference)


def test_more_tokens_may_be_added_and_nothing_else_changed(
    store_path: Path, tmp_path: Path
) -> None:
    sweep = config(store_path, tmp_path, tokens=2_560, coders=CODERS[:1])
    run, first = train_sweep(sweep)
    before = run.coder(run.coder_names()[0]).W_enc
    for changes, message in (
        ({"tokens": 2_000}, "tokens may only grow"),
        ({"batch_rows": 128}, "batch_rows is 128, but the run has 256"),
        ({"seed": 3}, "seed is 3, but the run has 0"),
        ({"coders": ({**CODERS[0], "k": 5},)}, "which is not in these tables"),
        ({"coders": (*CODERS[:1], {**CODERS[0], "k": 5})}, "Give --add-coders"),
        ({"token": 5}, "did you mean 'tokens'"),
        ({}, "this run is complete. To train it longer give more --tokens than 2,560"),
    ):
        with pytest.raises(UserError, match=message):
            resume(run.folder, changes)
    run, second = resume(run.folder, {"tokens": 5_120, "device": "cpu", "coders": CODERS[:1]})
    assert run.config()["completed"]["rows"] == 5_120
    assert all((b.fvu or 9) < (a.fvu or 0) for a, b in zip(first, second, strict=True))
    assert not run.coder(run.coder_names()[0]).W_enc.equal(before)
    assert [m["step"] for m in run.metrics() if m["coder"] == first[0].name][-1] == 20


def test_coders_may_be_added_and_begin_where_the_run_is(store_path: Path, tmp_path: Path) -> None:
    sweep = config(store_path, tmp_path, tokens=2_560, coders=CODERS[:1])
    run, _ = train_sweep(sweep)
    new = {"hookpoint": "layers.2.mlp", "k": 9, "n_latents": 64, "code": "hybrid"}
    with pytest.raises(ConfigError, match="has all of these coders already"):
        resume(run.folder, {"tokens": 5_120, "coders": CODERS[:1]}, add_coders=True)
    run, summaries = resume(run.folder, {"tokens": 5_120, "coders": (new,)}, add_coders=True)
    assert len(summaries) == 5 and len(run.coder_names()) == 5
    rows = [run.coder(s.name).about["rows"] for s in summaries]
    assert rows == [5_120] * 4 + [2_560]
    assert (summaries[-1].fvu or 9) < 1


def test_a_damaged_checkpoint_or_one_of_a_newer_version_is_refused(
    store_path: Path, tmp_path: Path
) -> None:
    run, _ = train_sweep(config(store_path, tmp_path, tokens=2_560, coders=CODERS[:1]))
    folder = run.folder / "checkpoint"
    latest = (folder / "latest.json").read_text()
    file = next(folder.glob("*/0.safetensors"))
    raw = file.read_bytes()
    file.write_bytes(raw[:-1])
    with pytest.raises(StoreError, match="damaged or cut short"):
        resume(run.folder, {"tokens": 5_120})
    file.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    with pytest.raises(StoreError, match="damaged or cut short"):
        resume(run.folder, {"tokens": 5_120})
    file.write_bytes(raw)
    for damaged, message in (
        (latest.replace('"version": 1', '"version": 7'), "format version 7"),
        (latest.replace("000000010", "../../../x"), "changed since it was written"),
        (latest[:40], "cannot be read"),
    ):
        (folder / "latest.json").write_text(damaged)
        with pytest.raises(StoreError, match=message):
            resume(run.folder, {"tokens": 5_120})
    assert Run.open(run.folder).coder_names()  # the run itself stands


def test_without_its_checkpoint_a_complete_run_cannot_go_on(
    store_path: Path, tmp_path: Path
) -> None:
    run, _ = train_sweep(
        config(store_path, tmp_path, tokens=2_560, coders=CODERS[:1], keep_checkpoint=False)
    )
    assert not (run.folder / "checkpoint").exists()
    with pytest.raises(UserError, match="its checkpoint was not kept"):
        resume(run.folder, {"tokens": 5_120})


def test_metrics_that_were_cut_off_are_counted_from_where_they_were_cut(
    store_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint right after a resume, before the next line of metrics."""
    sweep = config(store_path, tmp_path, tokens=5_120, coders=CODERS[:1], checkpoint_every=4)
    real = loop.Loop._step

    def stop_at(step: int, error: type[BaseException]) -> None:
        def stop(self: loop.Loop, batch: Any) -> None:
            if self.step == step:
                raise error
            real(self, batch)

        monkeypatch.setattr(loop.Loop, "_step", stop)

    stop_at(11, RuntimeError)  # lines of step 9 stand after the checkpoint of step 8
    with pytest.raises(RuntimeError):
        train_sweep(sweep)
    monkeypatch.setattr(loop.Loop, "_step", real)
    stop_at(8, RuntimeError)
    with pytest.raises(RuntimeError):
        resume(sweep.folder)
    monkeypatch.setattr(loop.Loop, "_step", real)
    reference, _ = train_sweep(sweep.model_copy(update={"name": "reference"}))
    other = tmp_path / "metrics.jsonl"
    other.write_bytes(b"x" * 100)
    with MetricsWriter(other, keep_bytes=60) as writer:
        assert writer.flush() == 60
    with pytest.raises(StoreError, match="shorter than when the checkpoint was written"):
        MetricsWriter(other, keep_bytes=61)
    run, _ = resume(sweep.folder)
    same_bytes(run, reference)


def test_a_run_is_resumed_from_anywhere_and_with_its_store_elsewhere(
    store_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").mkdir()
    monkeypatch.chdir(store_copy.parent)
    sweep = config(Path(store_copy.name), tmp_path / "a", tokens=2_560, coders=CODERS[:1])
    run, _ = train_sweep(sweep)
    monkeypatch.chdir(run.folder)
    resume(".", {"tokens": 3_840})
    moved = run.folder.rename(tmp_path / "a run [1]")
    resume(moved, {"tokens": 5_120})
    store = store_copy.rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="no such folder"):
        resume(moved, {"tokens": 6_400})
    run, _ = resume(moved, {"tokens": 6_400, "store": store})
    assert run.config()["completed"]["rows"] == 6_400


def test_fewer_tokens_are_refused_also_where_the_run_had_none(
    store_path: Path, tmp_path: Path
) -> None:
    sweep = config(store_path, tmp_path, tokens=None, coders=CODERS[:1])
    run, _ = train_sweep(sweep)
    before = run.config()
    with pytest.raises(ConfigError, match="tokens may only grow"):
        resume(run.folder, {"tokens": 1_024})
    assert run.config() == before


def test_a_run_whose_coders_are_all_done_is_complete(store_path: Path, tmp_path: Path) -> None:
    table = {"hookpoint": "layers.2.mlp", "k": 4, "n_latents": 64, "lr": 1e-9, "patience": 1}
    run, _ = train_sweep(config(store_path, tmp_path, eval_every=3, coders=(table,)))
    before = run.config()
    assert before["completed"]["rows"] < 24_000
    with pytest.raises(UserError, match="coders that were done or not finite stay so"):
        resume(run.folder)
    assert run.config() == before


def test_the_checkpoint_stands_until_the_coders_are_saved(
    store_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = config(store_path, tmp_path, tokens=2_560, coders=CODERS[:1], keep_checkpoint=False)
    real = SparseCoder.save

    def full(self: SparseCoder, folder: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(SparseCoder, "save", full)
    with pytest.raises(OSError, match="No space"):
        train_sweep(sweep)
    monkeypatch.setattr(SparseCoder, "save", real)
    reference, _ = train_sweep(sweep.model_copy(update={"name": "reference"}))
    run, _ = resume(sweep.folder)
    same_bytes(run, reference)
    assert not (run.folder / "checkpoint").exists()


def test_figures_of_an_evaluation_do_not_outlive_more_training(
    store_path: Path, tmp_path: Path
) -> None:
    run, _ = train_sweep(config(store_path, tmp_path, tokens=2_560, coders=CODERS[:1]))
    evaluate(run, EvalConfig(ce_tokens=128, ablation_bins=0, ultra_ablations=0, probes=()))
    assert raw(run.eval_path)["coders"]
    resume(run.folder, {"tokens": 5_120})
    with pytest.raises(StoreError, match="not evaluated yet"):
        EvaluationFolder(run).read()
    assert not run.eval_folder.exists()


def test_a_removed_checkpoint_does_not_keep_its_place_on_the_disk(
    store_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing of it is mapped once the run goes on."""
    run, _ = train_sweep(config(store_path, tmp_path))
    real = loop.Loop.run
    mapped: list[str] = []

    def noted(self: loop.Loop, passed: Any) -> Any:
        mapped.extend(m for m in Path("/proc/self/maps").read_text().split() if "checkpoint" in m)
        return real(self, passed)

    found = checkpoint.load_checkpoint(run.folder / "checkpoint")
    assert found is not None
    held = found.coder(run.coder_names()[0])
    assert "checkpoint" in Path("/proc/self/maps").read_text(), "what is held is mapped"
    del held
    monkeypatch.setattr(loop.Loop, "run", noted)
    record = run.config()
    resume(run.folder, {"tokens": 2 * (record.steps or 0) * (record.batch_rows or 0)})
    assert mapped == []

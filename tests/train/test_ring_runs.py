"""Training runs on a ring: what has no room in it, several processes, places that were dropped."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bsc.cache.store.folder import open_folder
from bsc.cache.store.ring import drop_reader, readers
from bsc.cache.store.ring_reader import RingReader
from bsc.cache.store.ring_status import ring_status
from bsc.cache.store.store import ActivationStore
from bsc.cli import main
from bsc.errors import StoreError, UserError
from bsc.train.bank_trainer import BankTrainer
from bsc.train.job import make_job
from bsc.train.loop import Loop
from bsc.train.memory import group_banks
from bsc.train.plan import plan_sweep
from bsc.train.resume import resume
from bsc.train.run import Run
from bsc.train.team import ALONE
from bsc.train.trainer import train_sweep
from bsc.train.training_rows import measure_moments
from tests.train.ring_pairs import Pair, capture_config, sweep_config


@pytest.fixture
def pair(tiny_model: Path, tmp_path: Path) -> Iterator[Pair]:
    """A ring of four shards of 1,500 rows with its writer at work."""
    made = Pair(capture_config(tiny_model, tmp_path, 1), sweep_config(tmp_path))
    made.start("writer 0")
    while not (tmp_path / "acts/provenance.json").exists():
        time.sleep(0.02)
    yield made
    made.kill("writer 0")


def test_what_has_no_room_in_a_ring_is_refused_with_numbers(pair: Pair, tmp_path: Path) -> None:
    room = ActivationStore(tmp_path / "acts").room
    assert room is not None and (room.slots, room.window, room.shard_rows) == (4, 2, 1500)
    assert (room.shards_at_once, room.most_shards, room.batch_rows) == (1, 2, 1500)
    with pytest.raises(UserError, match=r"batch_rows: 1,501 rows .* a ring of 4 shards of 1,500"):
        make_job(sweep_config(tmp_path, batch_rows=1501), "test")
    job = make_job(sweep_config(tmp_path, checkpoint_every=6), "test")
    with pytest.raises(UserError, match=r"--checkpoint-every 7: 1,750 rows pass") as caught:
        make_job(sweep_config(tmp_path, checkpoint_every=7), "test")
    steps, slots = re.findall(r"--checkpoint-every (\d+), .*--ring (\d+)", str(caught.value))[0]
    make_job(sweep_config(tmp_path, checkpoint_every=int(steps)), "test")
    assert room._replace(slots=int(slots)).fits(7 * 250)
    plan = plan_sweep(job, measure=False)
    assert plan.to_json()["checkpoint_rows"] == room.checkpoint_rows == 1500
    assert any("every 1,500 rows" in line for line in plan.lines())


def test_processes_that_divide_the_coders_of_a_run_begin_at_one_shard(
    pair: Pair, tmp_path: Path
) -> None:
    """One that is started when the other has long been reading, too."""
    config = sweep_config(tmp_path)
    results: dict[int, Any] = {}

    def train(rank: int) -> None:
        results[rank] = train_sweep(config, rank=rank, world=2)

    first = threading.Thread(target=train, args=(1,))
    first.start()
    folder = open_folder(tmp_path / "acts")
    while len(readers(folder)) < 2 or not any(c.next_shard for c in readers(folder)):
        time.sleep(0.02)
    status = ring_status(ActivationStore(tmp_path / "acts"))
    waiting = {r.name: r.next_shard for r in status.readers if r.state == "not started"}
    assert waiting == {"run.0": 0}
    train(0)
    first.join()
    pair.finish()
    run = Run.open(config.folder)
    assert {m["rows"] for m in run.metrics() if m["step"] == 96} == {24_000}
    assert readers(folder) == [] and len(results) == 2


def test_a_run_whose_place_was_dropped_says_so(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = sweep_config(tmp_path)
    real = Loop._step

    def stop(self: Loop, batch: Any) -> None:
        if self.step == 40:
            raise RuntimeError("stands for a kill")
        real(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Loop, "_step", stop)
        with pytest.raises(RuntimeError, match="stands for a kill"):
            train_sweep(config)
    folder = open_folder(tmp_path / "acts")
    (cursor,) = readers(folder)
    assert cursor.next_shard > 0
    checkpoint = json.loads(next(config.folder.glob("checkpoint/*/state.json")).read_text())
    assert checkpoint["cursor"][1] == cursor.next_shard
    with pytest.raises(SystemExit) as ended:
        main(["ring", str(tmp_path / "acts")])
    out = capsys.readouterr().out
    assert ended.value.code == 0 and f"needs shard {cursor.next_shard}" in out
    assert "reader     run: alive" in out  # this very process
    drop_reader(folder, "run", lambda seconds: None)
    with pytest.raises(SystemExit):
        main(["ring", str(tmp_path / "acts"), "--json"])
    assert json.loads(capsys.readouterr().out)["readers"] == []
    # Another reader moves the ring on.
    train_sweep(sweep_config(tmp_path, name="other"))
    with pytest.raises(UserError, match=r"goes on with shard \d+ .* its place was dropped"):
        resume(config.folder)
    assert readers(folder) == []  # and it holds nothing that others would wait for
    pair.finish()


def test_damaged_moments_are_named(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = sweep_config(tmp_path)
    real = Loop._step

    def stop(self: Loop, batch: Any) -> None:
        if self.step == 20:
            raise RuntimeError
        real(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Loop, "_step", stop)
        with pytest.raises(RuntimeError):
            train_sweep(config)
    path = config.folder / "moments.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:100])
    with pytest.raises(StoreError, match=r"moments\.safetensors: cannot be read"):
        resume(config.folder)
    path.write_bytes(whole)
    assert resume(config.folder)[0].config().completed
    pair.finish()


def test_a_run_that_waits_for_rows_can_be_stopped(pair: Pair, tmp_path: Path) -> None:
    """The capture is gone. A signal is heard at once, and a checkpoint written."""
    config = sweep_config(tmp_path, checkpoint_every=6)
    pair.start("reader")
    metrics = config.folder / "metrics.jsonl"
    while not metrics.exists():
        time.sleep(0.02)
    pair.kill("writer 0")
    reader = pair.processes["reader"]
    reader.join(3.0)
    if "reader" in pair.running:  # it waits for shards that do not come
        os.kill(reader.pid or 0, signal.SIGTERM)
        reader.join(20)
        assert "reader" not in pair.running
        (state,) = config.folder.glob("checkpoint/*/state.json")
        assert json.loads(state.read_text())["step"] > 0
    pair.start("writer 0", "reader")
    pair.finish()
    assert {m["rows"] for m in Run.open(config.folder).metrics() if m["step"] == 96} == {24_000}


def test_a_run_that_joins_late_plans_the_rows_that_are_left(pair: Pair, tmp_path: Path) -> None:
    """Its schedules come to their end, and its last figures are there."""
    drain = sweep_config(tmp_path, name="drain", tokens=6_000)
    train_sweep(drain)
    run, summaries = train_sweep(sweep_config(tmp_path, name="late"))
    pair.finish()
    config = run.config()
    assert config.steps is not None and config.steps < 96
    assert config.completed is not None and config.completed.rows == config.steps * 250
    lines = list(run.metrics())
    assert lines[-1]["step"] == config.steps and summaries[0].fvu is not None


def test_a_ring_that_ends_before_its_plan_leaves_figures(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As where tokens are left out: there are fewer rows than were planned."""
    monkeypatch.setattr("bsc.train.job._rows_gone", lambda *_: -6_000)
    run, summaries = train_sweep(sweep_config(tmp_path))
    pair.finish()
    assert "the ring has ended after 96 of 120 steps" in capsys.readouterr().err.replace("\n", " ")
    assert list(run.metrics())[-1]["step"] == 96 and summaries[0].fvu is not None
    assert resume(run.folder, ended=True)[1] == []


def test_killed_before_its_first_step_a_run_begins_again(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `bsc train --continue` does it: whatever of its first files is there."""
    config = sweep_config(tmp_path)

    def killed(*args: Any) -> None:
        raise RuntimeError("stands for a kill")

    for what in ("save_moments", "write_typed"):
        with monkeypatch.context() as patch:
            patch.setattr(f"bsc.train.trainer.{what}", killed)
            with pytest.raises(RuntimeError, match="stands for a kill"):
                train_sweep(config.model_copy(update={"name": what}))
    # Each holds the ring for itself: they go on side by side.
    first = threading.Thread(target=resume, args=(config.folder.parent / "save_moments",))
    first.start()
    train_sweep(config.model_copy(update={"name": "write_typed"}))
    first.join(60)
    pair.finish()
    runs = [Run.open(config.folder.parent / what) for what in ("save_moments", "write_typed")]
    (a, b) = ({n: r.coder(n).tensors["W_dec"].tolist() for n in r.coder_names()} for r in runs)
    assert a == b


def test_held_out_rows_of_a_ring_are_the_first_whenever_a_run_is_started(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair.start("reader")
    pair.finish()
    job = make_job(sweep_config(tmp_path, name="more", eval_rows=500, tokens=1500), "test")
    moments = measure_moments(job.store, job.config, ("layers.1.mlp/input", "layers.1.mlp/output"))
    group = group_banks(job.mine)[0]
    bank = BankTrainer(group, job.store, job.config, job.device, 250, moments)
    split = job.store.held_out
    name = "layers.1.mlp/output"
    first = torch.cat([split.tensor(name, i) for i in range(split.shards)])[:500]
    found = Loop(job, [bank], ALONE)._held_out_rows()
    assert found is not None and torch.equal(found[name], first)
    # Fewer are committed yet, and the capture goes on: no figures rather than others.
    monkeypatch.setattr(type(split), "refresh", lambda self: None)
    monkeypatch.setattr(type(job.store), "complete", False)
    split.rows = 499
    assert Loop(job, [bank], ALONE)._held_out_rows() is None


def test_a_ring_whose_rows_have_passed_says_so(pair: Pair, tmp_path: Path) -> None:
    pair.start("reader")
    pair.finish()
    split = ActivationStore(tmp_path / "acts").train
    last = RingReader(split.folder, split.specs, split.grid, "last")
    last.passed(split.shards)
    last.close(leave=True)
    with pytest.raises(UserError, match="fewer rows than one batch of 1,500 are still to pass"):
        make_job(sweep_config(tmp_path, name="late", batch_rows=1500), "test")

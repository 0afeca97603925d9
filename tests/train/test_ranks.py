from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bsc.errors import StoreError, UserError
from bsc.train import loop, trainer
from bsc.train.config import SweepPoint, TrainConfig
from bsc.train.ranks import divide
from bsc.train.resume import resume
from bsc.train.run import Run
from bsc.train.sweep import plan_coders
from bsc.train.trainer import train_sweep

CODERS = ({"code": ["binary", "continuous"], "k": [2, 4], "n_latents": [48, 96]},)


def sweep(store_path: Path, runs: Path, **fields: Any) -> TrainConfig:
    values: dict[str, Any] = {
        "store": store_path, "runs": runs, "batch_rows": 256, "tokens": 2_560, "log_every": 2,
        "coders": CODERS,
    }  # fmt: skip
    return TrainConfig(**values | fields)


def test_coders_are_divided_by_their_cost(store: Any) -> None:
    points = [SweepPoint(n_latents=n, k=4, seed=s) for n in (64, 640) for s in range(6)]
    planned = plan_coders(points, store)
    shares = divide(planned, 3)
    assert sorted(c.name for share in shares for c in share) == sorted(c.name for c in planned)
    assert [sum(c.coder.n_latents for c in share) for share in shares] == [2 * 2 * (64 + 640)] * 3
    uneven = divide(planned[6:] + planned[:2], 2)  # twelve large ones to two small ones
    loads = [sum(c.coder.n_latents for c in share) for share in uneven]
    assert max(loads) - min(loads) <= 640
    # Two hookpoints: a rank of two reads one of them.
    assert [len({c.hookpoint for c in share}) for share in divide(planned, 2)] == [1, 1]
    teams = divide(planned[:3], 7)  # more ranks than coders: the first of each team has the coder
    assert [bool(share) for share in teams] == [True, False, False, True, False, True, False]


def test_ranks_of_a_job_array_make_one_run_in_any_order(store_path: Path, tmp_path: Path) -> None:
    alone, _ = train_sweep(sweep(store_path, tmp_path, name="alone"))
    config = sweep(store_path, tmp_path, name="array")
    for rank in (2, 0):
        train_sweep(config, rank=rank, world=3)
        with pytest.raises(StoreError, match="has not ended"):
            Run.open(config.folder)
    with pytest.raises(UserError, match="not empty"):
        train_sweep(config, rank=2, world=3)
    run, _ = train_sweep(config, rank=1, world=3)
    merged = Run.open(run.folder)
    assert merged.coder_names() == alone.coder_names()
    for name in alone.coder_names():
        a, b = ((r.coder_folder(name) / "coder.safetensors").read_bytes() for r in (alone, merged))
        assert a == b, name
    lines = [
        [(m["step"], m["coder"], m["fvu"], m["l0"]) for m in r.metrics()] for r in (alone, merged)
    ]
    order = {n: i for i, n in enumerate(alone.coder_names())}
    assert sorted(lines[0], key=lambda m: (m[0], order[m[1]])) == lines[1]
    with pytest.raises(UserError, match="complete run is here"):
        train_sweep(config, rank=0, world=2)


def test_parts_of_different_runs_are_not_put_together(store_path: Path, tmp_path: Path) -> None:
    train_sweep(sweep(store_path, tmp_path), rank=0, world=2)
    with pytest.raises(StoreError, match="rank 1 was trained with another batch_rows"):
        train_sweep(sweep(store_path, tmp_path, batch_rows=128), rank=1, world=2)


def test_ranks_that_differ_in_their_device_or_paths_are_one_run(
    store_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    train_sweep(sweep(store_path, Path(), name="x", device="cpu"), rank=0, world=2)
    run, _ = train_sweep(sweep(store_path, tmp_path, name="x", tensorboard=False), rank=1, world=2)
    assert len(Run.open(run.folder).coder_names()) == 16


def test_a_rank_is_resumed_as_it_was_started(
    store_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = sweep(store_path, tmp_path, checkpoint_every=2)
    reference, _ = train_sweep(config.model_copy(update={"name": "reference"}))
    real = loop.Loop._step

    def stop(self: loop.Loop, batch: Any) -> None:
        if self.step == 5:
            raise RuntimeError("power cut")
        real(self, batch)

    monkeypatch.setattr(loop.Loop, "_step", stop)
    for rank in (0, 1):
        with pytest.raises(RuntimeError):
            train_sweep(config, rank=rank, world=2)
    monkeypatch.setattr(loop.Loop, "_step", real)
    for rank, world in ((0, 1), (0, 3), (2, 3)):
        with pytest.raises(StoreError, match=r"trained by 2 process\(es\)"):
            resume(config.folder, rank=rank, world=world)
    with pytest.raises(StoreError, match="--rank R --world 2"):
        Run.open(config.folder)
    for rank in (1, 0):
        resume(config.folder, rank=rank, world=2)
    run = Run.open(config.folder)
    for name in reference.coder_names():
        a, b = ((r.coder_folder(name) / "coder.safetensors").read_bytes() for r in (reference, run))
        assert a == b


def test_ranks_train_on_longer_and_take_more_coders_each_keeping_its_own(
    store_path: Path, tmp_path: Path
) -> None:
    config = sweep(store_path, tmp_path)
    for rank in (0, 1):
        train_sweep(config, rank=rank, world=2)
    before = Run.open(config.folder).config()["assigned"]
    new = {"hookpoint": "layers.0.mlp", "k": 4, "n_latents": 640, "code": "hybrid"}
    changes = {"tokens": 5_120, "coders": (new,)}
    resume(config.folder, changes, add_coders=True, rank=0, world=2)
    with pytest.raises(StoreError, match="has not ended"):
        Run.open(config.folder)  # rank 1 is to follow
    resume(config.folder, changes, add_coders=True, rank=1, world=2)
    run = Run.open(config.folder)
    after = run.config()["assigned"]
    assert len(run.coder_names()) == 17 and {n: after[n] for n in before} == before
    rows = {n: run.coder(n).about["rows"] for n in run.coder_names()}
    assert {rows[n] for n in before} == {5_120}
    assert {r for n, r in rows.items() if n not in before} == {2_560}


def test_parts_that_ended_without_being_put_together_are(
    store_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill between the last part's end and the merge."""
    config = sweep(store_path, tmp_path)
    train_sweep(config, rank=0, world=2)
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "merge_parts", lambda *_: False)
        train_sweep(config, rank=1, world=2)
    with pytest.raises(StoreError, match="has not ended"):
        Run.open(config.folder)
    resume(config.folder, rank=1, world=2)
    assert len(Run.open(config.folder).coder_names()) == 16


@pytest.mark.slow
def test_torchrun_divides_a_sweep_over_its_processes(store_path: Path, tmp_path: Path) -> None:
    file = tmp_path / "sweep.toml"
    file.write_text(
        f'store = "{store_path}"\nruns = "{tmp_path}"\ntokens = 2_560\nbatch_rows = 256\n'
        '[[coders]]\ncode = ["binary", "continuous"]\nk = [2, 4]\nn_latents = 64\n'
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "bsc",
         "train", str(file)],
        env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    run = Run.open(tmp_path / "sweep")
    assert len(run.coder_names()) == 8  # two hookpoints
    parts = [json.loads((run.part(r, 2) / "config.json").read_text()) for r in (0, 1)]
    assert [p["rank"] for p in parts] == [0, 1]
    assert all(run.coder(n).about["rows"] == 2_560 for n in run.coder_names())

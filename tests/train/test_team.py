"""Several processes that train one coder together: the coder that one process trains."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import time
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch

from bsc.cache.store.loader import Loader
from bsc.cache.store.store import ActivationStore
from bsc.errors import UserError
from bsc.train.coders.config import CoderConfig
from bsc.train.config import TrainConfig
from bsc.train.resume import resume
from bsc.train.run import Run
from bsc.train.team import Team, teams_of
from bsc.train.trainer import train_sweep
from tests.train.ring_pairs import Pair, capture_config, sweep_config

CODERS: dict[str, dict[str, Any]] = {
    "continuous": {"code": "continuous"},
    "AuxK": {"code": "continuous", "auxk_alpha": 0.1, "site": "sae"},
    "binary": {"code": "binary", "site": "sae", "decoder_norm": "unit", "amplitude": "learned"},
    "hybrid": {"code": "hybrid", "k": 6},
    "batch top-k": {"code": "continuous", "select": "batch_topk"},
    "muon": {"code": "binary", "optimiser": "muon"},
    "signum": {"code": "binary", "optimiser": "signum", "clip_norm": 1.0},
}


def sweep(store: Path, runs: Path, name: str, *coders: dict[str, Any], **more: Any) -> TrainConfig:
    """Twenty steps of one coder."""
    values: dict[str, Any] = {
        "store": store, "runs": runs, "name": name, "batch_rows": 251, "tokens": 5_020,
        "log_every": 5, "dead_after": 1000, "precision": "fp32", "eval_rows": 256,
        "coders": tuple({"hookpoint": "layers.2.mlp", "k": 4, "n_latents": 64} | c for c in coders),
    }  # fmt: skip
    return TrainConfig(**values | more)


def _train(config: TrainConfig, rank: int, world: int, port: int) -> None:
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank),
        "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world),
    }  # fmt: skip
    torch.set_num_threads(1)
    leader = config.folder / "ranks" / "0" / "config.json"
    if leader.exists():
        resume(config.folder, rank=rank, world=world)
    else:
        train_sweep(config, rank=rank, world=world)


def start(config: TrainConfig, world: int) -> list[BaseProcess]:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["bsc.train.resume", "bsc.cache.capture.capture"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    found: list[BaseProcess] = []
    for rank in range(world):
        process = context.Process(target=_train, args=(config, rank, world, port))
        process.start()
        found.append(process)
    return found


def finish(processes: Sequence[BaseProcess]) -> None:
    for process in processes:
        process.join(120)
        if process.exitcode is None:
            process.kill()
    assert [p.exitcode for p in processes] == [0] * len(processes)


def last(run: Run) -> dict[str, Any]:
    return list(run.metrics())[-1]


@pytest.mark.parametrize("kind", CODERS)
def test_two_processes_train_the_coder_that_one_trains(
    store_path: Path, tmp_path: Path, kind: str
) -> None:
    alone, _ = train_sweep(sweep(store_path, tmp_path, "alone", CODERS[kind]))
    config = sweep(store_path, tmp_path, "team", CODERS[kind])
    finish(start(config, 2))
    team = Run.open(config.folder)
    a, b = last(alone), last(team)
    assert b["step"] == 20 and b["rows"] == 5020
    # Batch top-k selects within each process's rows.
    close = 3e-2 if kind == "batch top-k" else 1e-3
    assert b["fvu"] == pytest.approx(a["fvu"], rel=close)
    assert b["held_out_fvu"] == pytest.approx(a["held_out_fvu"], rel=close)
    assert b["l0"] == pytest.approx(a["l0"], rel=close)
    (name,) = team.coder_names()
    one, two = alone.coder(name).tensors, team.coder(name).tensors
    # Muon gives every direction of a gradient the same length, those of rounding too.
    share = 0.1 if kind == "muon" else 2e-3
    for key, tensor in one.items():
        if kind != "batch top-k":
            assert torch.allclose(tensor, two[key], rtol=0, atol=share * float(tensor.abs().max()))
    assert team.config().world == 2 and not (team.folder / "ranks" / "1").exists()


def test_two_processes_begin_with_the_gradient_of_one(store_path: Path, tmp_path: Path) -> None:
    """One step, before rounding has grown: the sums of the parts are the sum of the whole."""
    for name, k in (("continuous", {}), ("binary", CODERS["binary"])):
        coders = {"code": "continuous", "optimiser": "signum_classic", "lr": 1e-3} | k
        alone, _ = train_sweep(sweep(store_path, tmp_path, f"a-{name}", coders, tokens=251))
        config = sweep(store_path, tmp_path, f"t-{name}", coders, tokens=251)
        finish(start(config, 2))
        (coder,) = alone.coder_names()
        one, two = alone.coder(coder).tensors, Run.open(config.folder).coder(coder).tensors
        for key, tensor in one.items():  # signs of gradients: all but those next to 0 are the same
            assert ((tensor - two[key]).abs() < 1e-5).float().mean() > 0.999, (name, key)


def test_coders_get_teams_by_their_cost_and_make_one_run(store_path: Path, tmp_path: Path) -> None:
    coders = ({"code": "continuous", "n_latents": 256}, {"code": "binary", "n_latents": 64})
    alone, _ = train_sweep(sweep(store_path, tmp_path, "alone", *coders))
    config = sweep(store_path, tmp_path, "teams", *coders)
    finish(start(config, 3))
    run = Run.open(config.folder)
    assert run.config().assigned == dict(zip(run.coder_names(), [0, 2], strict=True))
    assert sorted(p.name for p in (run.folder / "ranks").iterdir()) == ["0", "2"]
    figures = [{m["coder"]: m["fvu"] for m in r.metrics()} for r in (alone, run)]
    assert figures[1] == pytest.approx(figures[0], rel=1e-3)
    with pytest.raises(UserError, match="this run is complete"):
        resume(run.folder, rank=1, world=3)


def test_killed_together_a_team_goes_on_to_the_same_bytes(store_path: Path, tmp_path: Path) -> None:
    more = {"tokens": 30_000, "checkpoint_every": 3}
    whole = sweep(store_path, tmp_path, "whole", CODERS["binary"], **more)
    finish(start(whole, 2))
    config = sweep(store_path, tmp_path, "killed", CODERS["binary"], **more)
    checkpoint = config.folder / "ranks/0/checkpoint/latest.json"
    kills, before = 0, ""
    while kills < 3:
        processes = start(config, 2)
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and processes[0].exitcode is None:
            now = checkpoint.read_text() if checkpoint.exists() else ""
            if now != before:
                before = now
                break
            time.sleep(0.005)
        for process in processes[:: 1 if kills % 2 else -1]:
            os.kill(process.pid or 0, signal.SIGKILL)
            process.join()
        kills += 1
    finish(start(config, 2))
    runs = [Run.open(c.folder) for c in (whole, config)]
    (name,) = runs[0].coder_names()
    tensors = [(r.coder_folder(name) / "coder.safetensors").read_bytes() for r in runs]
    assert tensors[0] == tensors[1]
    assert last(runs[0])["fvu"] == last(runs[1])["fvu"]


def test_a_team_reads_a_ring(tiny_model: Path, tmp_path: Path) -> None:
    """The first of it holds the place; the store is the one that a single process reads."""
    config = sweep_config(tmp_path, coders=({"k": 4, "n_latents": 64},), precision="fp32")
    pair = Pair(capture_config(tiny_model, tmp_path, 1), config)
    pair.start("writer 0")
    while not (tmp_path / "acts/provenance.json").exists():
        time.sleep(0.02)
    processes = start(config, 2)
    finish(processes)
    pair.finish()
    run = Run.open(config.folder)
    assert last(run)["rows"] == 24_000 and last(run)["fvu"] < 1
    assert not list((tmp_path / "acts/ring").glob("*.json"))


def test_processes_that_torchrun_did_not_start_are_told(store_path: Path, tmp_path: Path) -> None:
    config = sweep(store_path, tmp_path, "lost", CODERS["continuous"])
    with pytest.raises(UserError, match=r"--world 2: more processes than the 1 coders.*torchrun"):
        train_sweep(config, rank=0, world=2)
    assert not config.folder.exists()


def test_what_a_team_cannot_do_is_refused(store_path: Path, tmp_path: Path) -> None:
    small = sweep(store_path, tmp_path, "small", CODERS["continuous"], batch_rows=2, tokens=10)
    with pytest.raises(UserError, match="2 rows in a batch are fewer than the 3 processes"):
        train_sweep(small, rank=1, world=3)
    config = sweep(store_path, tmp_path, "done", CODERS["continuous"], tokens=251)
    finish(start(config, 2))
    before = (config.folder / "config.json").read_bytes()
    for rank in (0, 1):
        with pytest.raises(UserError, match="2 processes share the rows of 1 coders"):
            resume(
                config.folder, {"coders": ({"hookpoint": "layers.2.mlp", "k": 8},)},
                add_coders=True, rank=rank, world=2,
            )  # fmt: skip
    assert (config.folder / "config.json").read_bytes() == before


def test_processes_go_to_the_costliest_coders() -> None:
    def coder(latents: int) -> CoderConfig:
        return CoderConfig(
            site="sae", code="binary", decoder_norm="unit", k=2, n_latents=latents, d_in=8, d_out=8
        )

    coders = [coder(n) for n in (100, 400, 100)]
    assert [len(t) for t in teams_of(coders, 8)] == [2, 4, 2]
    assert [list(t) for t in teams_of(coders[:2], 3)] == [[0], [1, 2]]


@pytest.mark.parametrize("size", [2, 3])
def test_parts_of_batches_are_each_row_once_and_few_shards(store_path: Path, size: int) -> None:
    split, names = ActivationStore(store_path).train, ("layers.2.mlp/input", "layers.2.mlp/output")
    seen: list[list[tuple[Any, ...]]] = []
    opened: list[int] = []
    for place in [None, *range(size)]:
        team = Team(range(size), place or 0)
        part = None if place is None else team.part(500)
        loader = Loader(split, names, batch_rows=500, seed=3, part=part)
        batches = loader.batches()
        taken = [tuple(t.clone() for t in next(batches)) for _ in range(7)]  # more than a group
        seen.append(taken)
        group = loader._open(iter([(0, [0, 1, 2, 3])]), 0, 0, 0)
        assert group is not None
        opened.append(len(group.rows[names[0]]))
    for i, whole in enumerate(seen[0]):
        for side in (0, 1):
            parts = torch.cat([s[i][side] for s in seen[1:]])
            assert torch.equal(parts, whole[side])
    assert opened[0] == 4 and sum(opened[1:]) <= 4 + size


def test_the_figures_of_a_team_say_how_many_share_the_rows(
    store_path: Path, tmp_path: Path
) -> None:
    config = sweep(store_path, tmp_path, "said", CODERS["continuous"], tokens=251)
    finish(start(config, 2))
    record = json.loads((config.folder / "config.json").read_text())
    assert (record["world"], record["rank"], record["micro_rows"]) == (2, 0, 126)

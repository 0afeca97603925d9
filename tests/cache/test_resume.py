"""Captures that are killed at any instant and started again."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from bsc.cache.capture.capture import CaptureResult, capture
from bsc.cache.capture.config import CaptureConfig
from bsc.cache.capture.source import Source
from bsc.cache.model.text_source import TextSource
from bsc.cache.store.folder import LocalFolder
from bsc.cache.store.store import ActivationStore
from bsc.cache.store.verify import verify
from bsc.errors import UserError
from tests.cache.captures import config_of
from tests.cache.synthetic import files_of

ROOT = Path(__file__).parent.parent.parent
WORLD = {"rank": 0, "world": 1}

CHILD = """
import os, signal, sys
import torch
torch.set_num_threads(1)
from pathlib import Path
from bsc.cache.store.folder import LocalFolder
from tests.cache.captures import config_of

steps = 0
def count(method):
    def counted(self, *args):
        global steps
        if steps == int(sys.argv[3]):
            os.kill(os.getpid(), signal.SIGKILL)
        steps += 1
        return method(self, *args)
    return counted
# Every step that changes what a reader or a restart sees.
for name in ("create", "staging", "publish", "write", "delete", "claim", "drop_locks"):
    setattr(LocalFolder, name, count(getattr(LocalFolder, name)))
from bsc.cache.capture.capture import capture
capture(config_of(sys.argv[1], Path(sys.argv[2])))
print(steps)
"""


def child(model: Path, store: Path, steps: int) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", CHILD, str(model), str(store), str(steps)],
        cwd=ROOT, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip


@pytest.fixture(scope="module")
def whole(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    store = tmp_path_factory.mktemp("whole") / "acts"
    capture(config_of(str(tiny_model), store))
    assert list(verify(store)) == []
    return store


def check(store: Path, whole: Path) -> None:
    assert files_of(store) == files_of(whole)
    a, b = (json.loads((s / "provenance.json").read_text()) for s in (store, whole))
    for value in (a, b):
        value.pop("started_at")
        value["completed"].pop("at")
        value.pop("xxh3_128")
    assert a == b
    assert not [p for p in store.parent.iterdir() if p != store]


class Killed(BaseException):
    """Stands for SIGKILL: nothing in the code under test may catch it and tidy up."""


def kill_at(monkeypatch: pytest.MonkeyPatch, step: int) -> Callable[[], int]:
    """Make the process stop dead at the n-th step that touches the disk; the steps so far.

    From then on every step fails, so that clean-up cannot help either.
    """
    taken = 0

    def wrap(name: str) -> None:
        method = getattr(LocalFolder, name)

        def counted(self: LocalFolder, *args: object) -> object:
            nonlocal taken
            taken += 1
            if taken > step:
                raise Killed
            return method(self, *args)

        monkeypatch.setattr(LocalFolder, name, counted)

    for name in ("create", "staging", "publish", "write", "delete", "claim", "drop_locks"):
        wrap(name)
    # A dead process unlinks nothing.
    monkeypatch.setattr("bsc.cache.store.shard.ShardWriter.abort", lambda self: None)
    return lambda: taken


@pytest.mark.slow
def test_killed_between_any_two_steps_and_started_again_the_store_is_the_same(
    tiny_model: Path, whole: Path, tmp_path: Path
) -> None:
    """Every step: shards staged and published, manifests, shapes, ends, locks."""
    with pytest.MonkeyPatch.context() as patch:
        steps = kill_at(patch, 10**9)
        capture(config_of(str(tiny_model), tmp_path / "count"))
        n_steps = steps()
    shutil.rmtree(tmp_path / "count")
    assert n_steps > 150
    rng = random.Random(0)
    # All steps around the first commits and the end, and a sample of the others.
    chosen = {1, 2, *range(n_steps - 14, n_steps), *rng.sample(range(3, n_steps), 30)}
    for step in sorted(chosen):
        store = tmp_path / f"acts-{step}" / "acts"
        with pytest.MonkeyPatch.context() as patch:
            kill_at(patch, step)
            with pytest.raises((Killed, UserError)):
                capture(config_of(str(tiny_model), store))
        capture(config_of(str(tiny_model), store))
        check(store, whole)


@pytest.mark.slow
def test_sigkill_at_random_instants_twice_in_a_row(
    tiny_model: Path, whole: Path, tmp_path: Path
) -> None:
    """The real signal on a real process, by step and by the clock."""
    rng = random.Random(1)
    killed = 0
    for trial in range(2):
        store = tmp_path / f"acts-{trial}" / "acts"
        for _ in range(2):
            done = child(tiny_model, store, rng.randrange(5, 150))
            killed += done.returncode == -signal.SIGKILL
            assert done.returncode in (0, -signal.SIGKILL), done.stderr
        process = subprocess.Popen(
            [sys.executable, "-c", CHILD, str(tiny_model), str(store), "1000000"], cwd=ROOT,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        deadline = time.monotonic() + 60
        seen = len(list(store.rglob("*.jsonl")))
        while time.monotonic() < deadline and process.poll() is None:
            if len(list(store.rglob("*.jsonl"))) >= seen + 3:
                break
            time.sleep(0.01)
        time.sleep(rng.random() * 0.2)
        process.kill()
        killed += process.wait() == -signal.SIGKILL
        assert child(tiny_model, store, 10**6).returncode == 0
        check(store, whole)
    assert killed >= 3


def test_a_finished_capture_given_again_says_so_and_changes_nothing(
    tiny_model: Path, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {p: p.stat().st_mtime_ns for p in whole.rglob("*")}
    result = capture(config_of(str(tiny_model), whole))
    assert "finished already" in capsys.readouterr().err
    assert (result.rows, result.bytes, result.complete) == (3600, 0, True)
    assert {p: p.stat().st_mtime_ns for p in whole.rglob("*") if p.is_file()} == {
        p: t for p, t in before.items() if p.is_file()
    }


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"hookpoints": ("layers.0.mlp",)}, r"hookpoints is .*layers\.1\.mlp.*asked for is"),
        ({"seed": 1}, r"seed is 0, asked for is 1"),
        ({"tokens": 7_000}, r"tokens is 3600, asked for is 7000"),
        ({"packing": "joined"}, r'packing is "masked", asked for is "joined"'),
        ({"codec": "int8"}, r'codec is "raw", asked for is "int8"'),
        ({"context": 16}, r"context is 32, asked for is 16"),
        ({"dtype": "float16"}, r'model\.dtype is "b?float(16|32)", asked for is "float16"'),
        ({"text": TextSource(corpus="stdlib")}, r"text\.corpus is null, asked for is .stdlib"),
        ({"rank": 1, "world": 2}, r"capture: writers is 1, asked for is 2\."),
    ],
)
def test_another_capture_on_a_started_store_is_refused_with_what_differs(
    tiny_model: Path, whole: Path, change: dict[str, object], named: str
) -> None:
    before = files_of(whole)
    with pytest.raises(UserError, match=named):
        capture(config_of(str(tiny_model), whole, **change))
    assert files_of(whole) == before


def test_a_second_process_on_the_same_part_is_refused(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused: list[str] = []
    real = Source.block

    def meanwhile(self: Source, batch: object) -> object:
        if not refused:
            refused.append("asked")
            with pytest.raises(UserError, match=r"is writing part 0 of this store"):
                capture(config_of(str(tiny_model), tmp_path / "acts"))
            refused.append("refused")
        return real(self, batch)  # type: ignore[arg-type]

    monkeypatch.setattr(Source, "block", meanwhile)
    capture(config_of(str(tiny_model), tmp_path / "acts"))
    assert len(refused) == 2 and list(verify(tmp_path / "acts")) == []


def test_two_ranks_and_one_of_them_killed_and_started_again_alone(
    tiny_model: Path, tmp_path: Path
) -> None:
    def both(store: Path, spoil: bool) -> list[CaptureResult]:
        results = []
        for rank in (1, 0):
            if spoil and rank == 1:
                with pytest.MonkeyPatch.context() as patch:
                    kill_at(patch, 150)
                    with pytest.raises(Killed):
                        capture(config_of(str(tiny_model), store, rank=rank, world=2))
                # A reader meanwhile sees a store that is right as far as it goes.
                assert not ActivationStore(store).complete and list(verify(store)) == []
            results.append(capture(config_of(str(tiny_model), store, rank=rank, world=2)))
        if spoil:
            results.append(capture(config_of(str(tiny_model), store, rank=1, world=2)))
        return results

    results = both(tmp_path / "a", spoil=False)
    assert [r.complete for r in results] == [False, True]
    both(tmp_path / "b", spoil=True)
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")
    assert list(verify(tmp_path / "a")) == []
    store = ActivationStore(tmp_path / "a")
    assert store.train.rows == 3_584 and store.writers == 2
    documents = store.train.tokens("doc_id")
    owner = [i // store.train.grid.shard_rows % 2 for i in range(store.train.rows)]
    assert (documents % 2 == owner).all()


def test_torchrun_starts_the_processes_of_one_store(tiny_model: Path, tmp_path: Path) -> None:
    arguments = [
        "cache", "--model", str(tiny_model), "--store", str(tmp_path / "acts"), "--text", "stdlib",
        "--hookpoints", "layers.1.mlp", "--tokens", "3600", "--held-out-tokens", "1200",
        "--context", "32", "--batch-tokens", "256",
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "bsc",
         *arguments],
        cwd=ROOT, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    store = ActivationStore(tmp_path / "acts")
    assert store.complete and store.writers == 2
    assert list(verify(tmp_path / "acts")) == []


@pytest.mark.slow
def test_killed_around_the_end_of_a_text_that_ended_early(tiny_model: Path, tmp_path: Path) -> None:
    """The last window is short, rows are dropped, and nobody may forget or recount them."""

    def config(store: Path) -> CaptureConfig:
        return config_of(str(tiny_model), store, tokens=50_000, window=64)

    capture(config(tmp_path / "whole"))
    with pytest.MonkeyPatch.context() as patch:
        steps = kill_at(patch, 10**9)
        capture(config(tmp_path / "count"))
        n_steps = steps()
    for step in range(n_steps - 16, n_steps):
        store = tmp_path / f"acts-{step}" / "acts"
        with pytest.MonkeyPatch.context() as patch:
            kill_at(patch, step)
            with pytest.raises(Killed):
                capture(config(store))
        assert list(verify(store)) == [], step
        capture(config(store))
        check(store, tmp_path / "whole")
        assert list(verify(store)) == []


@pytest.mark.slow
def test_ranks_that_start_at_the_same_moment(tiny_model: Path, tmp_path: Path) -> None:
    store = tmp_path / "new" / "acts"
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "bsc", "cache", "--model", str(tiny_model), "--store",
             str(store), "--text", str(tiny_model.parent / "corpus.jsonl"), "--hookpoints",
             "layers.1.mlp", "--tokens", "3600", "--context", "32", "--batch-tokens", "256",
             "--rank", str(rank), "--world", "3"],
            cwd=ROOT, stderr=subprocess.PIPE, text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        for rank in range(3)
    ]  # fmt: skip
    for process in processes:
        error = process.communicate()[1]
        assert process.returncode == 0, error
    assert ActivationStore(store).complete and list(verify(store)) == []

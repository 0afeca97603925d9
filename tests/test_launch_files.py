"""The launch files in examples/, as a user starts them, on a scheduler that stands for Slurm."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from bsc.cache.store.store import ActivationStore
from bsc.cache.store.verify import verify
from bsc.train.run import Run
from tests.scheduler import Scheduler

EXAMPLES = Path(__file__).parent.parent / "examples"
SWEEP = """
batch_rows = 250
dead_after = 2000
[[coders]]
code = {codes}
k = 4
n_latents = 64
"""
TEXT = ["--text", "stdlib", "--hookpoints", "layers.1.mlp", "--context", "32"]


def environment(tmp_path: Path) -> dict[str, str]:
    return dict(os.environ) | {
        "STORE": str(tmp_path / "acts"), "RUNS": str(tmp_path / "runs"), "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1", "POLL": "0.1",
    }  # fmt: skip


def sweep(tmp_path: Path, codes: str) -> Path:
    path = tmp_path / "sweep.toml"
    path.write_text(SWEEP.format(codes=codes))
    return path


def test_every_launch_file_is_a_script_that_stops_at_the_first_mistake() -> None:
    files = sorted(EXAMPLES.rglob("*.sh"))
    assert len(files) == 5
    for path in files:
        text = path.read_text()
        assert text.startswith("#!/bin/bash\n") and "\nset -euo pipefail\n" in text, path
        subprocess.run(["bash", "-n", str(path)], check=True)
        env = {"PATH": os.environ["PATH"]}
        done = subprocess.run(["bash", str(path)], env=env, capture_output=True, text=True)
        assert done.returncode != 0 and "say where the store is" in done.stderr, path


@pytest.mark.slow
def test_an_array_captures_into_a_ring_and_another_trains_on_it(
    tiny_model: Path, tmp_path: Path
) -> None:
    """Two writers, two trainers, two nodes; the first of each is taken away once."""
    scheduler = Scheduler(tmp_path / "slurm", environment(tmp_path), preempt_after=6.0)
    command = [
        "bash", str(EXAMPLES / "slurm/ring.sh"), str(sweep(tmp_path, '["binary", "continuous"]')),
        "--model", str(tiny_model), *TEXT, "--tokens", "80k", "--ring", "8",
    ]  # fmt: skip
    env = scheduler.env | {"WRITERS": "2", "TRAINERS": "2"}
    submitting = subprocess.Popen(command, env=env, cwd=tmp_path)
    scheduler.run(expected=4)
    assert submitting.wait(30) == 0
    assert sorted(scheduler.ended) == [("capture.sh", 0)] * 2 + [("train.sh", 0)] * 2
    assert scheduler.preempted >= 1
    store, run = ActivationStore(tmp_path / "acts"), Run.open(tmp_path / "runs/sweep")
    assert store.complete and store.writers == 2 and list(verify(tmp_path / "acts")) == []
    last = {m["coder"]: m["rows"] for m in run.metrics()}
    assert set(last.values()) == {store.train.rows // 250 * 250} and len(last) == 2


@pytest.mark.slow
def test_two_nodes_train_one_coder_together(store_path: Path, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    env = environment(tmp_path) | {"STORE": str(store_path), "PORT": port}
    scheduler = Scheduler(tmp_path / "slurm", env, preempt_after=1e9)
    file = sweep(tmp_path, '"binary"').read_text() + 'hookpoint = "layers.2.mlp"\n'
    (tmp_path / "sweep.toml").write_text(file)
    arguments = [str(tmp_path / "sweep.toml"), "--runs", str(tmp_path / "runs")]
    scheduler.submit(EXAMPLES / "slurm/train_together.sh", *arguments)
    scheduler.run(expected=1)
    assert scheduler.ended == [("train_together.sh", 0)]
    run = Run.open(tmp_path / "runs/sweep")
    assert run.config().world == 2 and len(run.coder_names()) == 1
    # Queued again, it has nothing to do and says so.
    scheduler.submit(EXAMPLES / "slurm/train_together.sh", *arguments)
    scheduler.run(expected=2)
    assert scheduler.ended == [("train_together.sh", 0)] * 2


@pytest.mark.slow
def test_one_machine_from_text_to_report(tiny_model: Path, tmp_path: Path) -> None:
    env = environment(tmp_path) | {
        "GPUS": "2",
        "SWEEP": str(sweep(tmp_path, '["binary", "continuous"]')),
    }
    env["PATH"] = f"{Path(sys.executable).parent}:{env['PATH']}"
    command = ["bash", str(EXAMPLES / "torchrun.sh"), "--model", str(tiny_model), *TEXT]
    command += ["--tokens", "20k", "--held-out-tokens", "2k", "--held-out", "0.2"]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "runs/sweep/report.html").exists()
    assert ActivationStore(tmp_path / "acts").writers == 2

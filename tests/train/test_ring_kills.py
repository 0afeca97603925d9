"""A ring whose writers and reader are killed at any instant: the same coders, the same bytes."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from bsc.cache.store.folder import open_folder
from bsc.cache.store.ring import readers
from bsc.cache.store.verify import verify
from bsc.train.run import Run
from tests.train.ring_pairs import Pair, capture_config, sweep_config

KILLS = 20


def result(root: Path) -> dict[str, bytes]:
    """All that a pair leaves and that nothing but chance could change: manifest, sums, coders."""
    run, found = Run.open(root / "runs/run"), {}
    for name in run.coder_names():
        found[name] = (run.coder_folder(name) / "coder.safetensors").read_bytes()
    lines = [
        {k: v for k, v in m.items() if k not in ("seconds", "waiting_for_data")}
        for m in run.metrics()
    ]
    found["metrics"] = json.dumps(lines).encode()
    for path in sorted((root / "acts").rglob("*")):
        if path.suffix == ".jsonl" or path.name == "zarr.json":
            found[str(path.relative_to(root))] = path.read_bytes()
    return found


@pytest.mark.slow
@pytest.mark.parametrize("writers", [1, 3])
def test_killed_at_random_the_pair_ends_in_the_same_coders(
    tiny_model: Path, tmp_path: Path, writers: int
) -> None:
    def pair(name: str) -> Pair:
        root = tmp_path / name
        return Pair(capture_config(tiny_model, root, writers), sweep_config(root))

    names = [*(f"writer {rank}" for rank in range(writers)), "reader"]
    whole = pair("whole")
    whole.start(*names)
    whole.finish()
    expected = result(tmp_path / "whole")
    assert len(expected) > 8
    rng, kills, runs = random.Random(writers), dict.fromkeys(names, 0), 0
    while sum(kills.values()) < KILLS:
        mine = pair(f"run-{runs}")
        mine.start(*rng.sample(names, len(names)))
        seconds = 1.5
        while mine.running and sum(kills.values()) < KILLS:
            some = mine.processes[mine.running[0]]
            some.join(seconds * rng.uniform(0.2, 1.8))
            assert not mine.failed(), mine.failed()
            victims = rng.sample(names, rng.choice([1, 1, len(names)]))
            killed = mine.kill(*victims)
            for name in killed:
                kills[name] += 1
            mine.start(*rng.sample(killed, len(killed)))
            seconds *= 1.05  # a slow machine gets somewhere, too
        mine.finish()
        root = tmp_path / f"run-{runs}"
        found = result(root)
        assert found.keys() == expected.keys()
        assert [k for k in expected if found[k] != expected[k]] == []
        assert readers(open_folder(root / "acts")) == []
        assert list(verify(root / "acts")) == []
        runs += 1
    assert kills["reader"] >= 3 and kills["writer 0"] >= 3, kills

"""A store to check, and what a check of it read."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from bsc.cache.store.layout import Grid
from bsc.cache.store.store import ActivationStore
from bsc.cache.store.verify import verify
from bsc.cache.store.verify_journal import VerifyJournal
from bsc.cache.store.verify_shards import ShardPool
from tests.cache.synthetic import make_store

__all__ = ["GRID", "checked", "flip", "made", "read", "shard", "store"]

GRID = Grid(96, 24, 10)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("store") / "s"
    make_store(root, 960, GRID, window=3)
    return root


@pytest.fixture
def store(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made, tmp_path / "s")


def shard(store: Path, number: int, side: str = "input") -> Path:
    return store / f"data.zarr/layers.0.mlp/{side}/c/{number}/0"


def flip(path: Path, at: int = 7) -> None:
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    path.write_bytes(raw)


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Keys of the shards whose rows are read."""
    keys: list[str] = []
    real = ShardPool._content

    def spy(self: ShardPool, key: str, *rest: Any) -> list[str]:
        keys.append(key)
        return real(self, key, *rest)

    monkeypatch.setattr(ShardPool, "_content", spy)
    return keys


def checked(store: Path | str, journal: Path, jobs: int = 2) -> tuple[list[str], int, int]:
    """Problems, bytes that were read, and bytes that the journal had."""
    read: list[int] = []
    with VerifyJournal(journal, ActivationStore(store)) as kept:
        problems = list(verify(store, read.append, jobs=jobs, journal=kept))
        return problems, sum(read), kept.taken

"""Random damage anywhere in a store is found by `verify`, or does not change what it means."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from bsc.cache.store.kinds import Codec
from bsc.cache.store.layout import Grid
from bsc.cache.store.verify import verify
from tests.cache.synthetic import make_store

TRIALS = 600
Damage = Callable[[random.Random, list[Path]], list[Path]]


def flip(rng: random.Random, files: list[Path]) -> list[Path]:
    path = rng.choice(files)
    raw = bytearray(path.read_bytes())
    raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
    path.write_bytes(raw)
    return [path]


def cut(rng: random.Random, files: list[Path]) -> list[Path]:
    path = rng.choice(files)
    raw = path.read_bytes()
    path.write_bytes(raw[: rng.randrange(len(raw))])
    return [path]


def lengthen(rng: random.Random, files: list[Path]) -> list[Path]:
    path = rng.choice(files)
    path.write_bytes(path.read_bytes() + rng.randbytes(rng.randrange(1, 40)))
    return [path]


def delete(rng: random.Random, files: list[Path]) -> list[Path]:
    path = rng.choice(files)
    path.unlink()
    return [path]


def swap(rng: random.Random, files: list[Path]) -> list[Path]:
    """Two files of the same size and different content change places."""
    for _ in range(100):
        a = rng.choice(files)
        others = [f for f in files if f != a and f.stat().st_size == a.stat().st_size]
        b = rng.choice(others or [a])
        one, two = a.read_bytes(), b.read_bytes()
        if one != two:
            a.write_bytes(two)
            b.write_bytes(one)
            return [a, b]
    raise AssertionError("no two files to swap")


def duplicate(rng: random.Random, files: list[Path]) -> list[Path]:
    path = rng.choice(files)
    copy = path.with_name(path.name + rng.choice(["~", ".bak", "0"]))
    if copy.exists():
        return delete(rng, files)
    shutil.copy(path, copy)
    return [copy]


def zero_page(rng: random.Random, files: list[Path]) -> list[Path]:
    """What a lost write leaves: some bytes are zero that were not."""
    while True:
        path = rng.choice(files)
        raw = bytearray(path.read_bytes())
        at = rng.randrange(len(raw))
        n = min(len(raw) - at, 512)
        if any(raw[at : at + n]):
            raw[at : at + n] = bytes(n)
            path.write_bytes(raw)
            return [path]


DAMAGES: tuple[Damage, ...] = (flip, flip, flip, cut, lengthen, delete, swap, duplicate, zero_page)


@pytest.mark.parametrize("codec", ["raw", "lz4", "int8"])
def test_every_random_corruption_is_found_and_its_file_named(tmp_path: Path, codec: Codec) -> None:
    store = tmp_path / "store"
    make_store(store, 480, Grid(96, 24, 5), window=3, codec=codec)
    files = sorted(p for p in store.rglob("*") if p.is_file())
    whole = {p: p.read_bytes() for p in files}
    rng = random.Random(f"{codec} 0")
    for trial in range(TRIALS // 3):
        damage = DAMAGES[trial % len(DAMAGES)]
        touched = damage(rng, files)
        problems = list(verify(store))
        told = " ".join(problems)
        assert problems, (trial, damage.__name__, touched)
        # At least one of the files is named; of metadata that nothing can be read with, the store.
        assert any(str(p) in told or p.name in told for p in touched), (trial, problems)
        for path in touched:
            path.unlink(missing_ok=True)
        for path in files:
            if not path.exists():
                path.write_bytes(whole[path])
    assert list(verify(store)) == []


def test_quick_finds_all_but_changed_rows(tmp_path: Path) -> None:
    store = tmp_path / "store"
    make_store(store, 480, Grid(96, 24, 5), window=3)
    shard = store / "data.zarr/layers.0.mlp/input/c/2/0"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:5] + bytes([whole[5] ^ 1]) + whole[6:])
    assert list(verify(store, quick=True)) == [] != list(verify(store))
    for raw in (whole[:-1], whole[:-3] + bytes([whole[-3] ^ 1]) + whole[-2:]):
        shard.write_bytes(raw)
        assert any(str(shard) in p for p in verify(store, quick=True))
    shard.write_bytes(whole)
    manifest = store / "manifest/train/0-000000.jsonl"
    lines = manifest.read_text().splitlines(keepends=True)
    manifest.write_text("".join(lines[:1]) + json.dumps({"rows": 1}) + "\n")
    assert any(str(manifest) in p for p in verify(store, quick=True))

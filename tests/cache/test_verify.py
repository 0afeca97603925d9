from __future__ import annotations

import random
from pathlib import Path

import pytest

from bsc.cache.store.verify import verify


def shards(store: Path) -> list[Path]:
    return sorted(p for p in (store / "data.zarr").rglob("*") if p.is_file() and "/c/" in str(p))


def test_a_fresh_store_is_right(store_path: Path) -> None:
    assert list(verify(store_path)) == []


def test_any_flipped_bit_is_found_and_its_file_named(store_copy: Path) -> None:
    rng = random.Random(0)
    for path in rng.sample(shards(store_copy), 12):
        raw = path.read_bytes()
        at = rng.randrange(len(raw))
        path.write_bytes(raw[:at] + bytes([raw[at] ^ (1 << rng.randrange(8))]) + raw[at + 1 :])
        problems = list(verify(store_copy))
        assert problems and all(str(path) in p for p in problems), (path, at)
        path.write_bytes(raw)
    assert list(verify(store_copy)) == []


def test_a_changed_row_is_placed_in_its_chunk(store_copy: Path) -> None:
    path = next(p for p in shards(store_copy) if "layers.0.mlp/output" in str(p))
    raw = bytearray(path.read_bytes())
    raw[32 * 2 * 5 + 1] ^= 1  # row 5 of the shard, in its only chunk
    path.write_bytes(raw)
    (problem,) = verify(store_copy)
    assert problem.startswith(f"{path}: chunk 0 (rows 0 to ")


@pytest.mark.parametrize(
    "damage",
    ["truncated", "missing", "foreign", "line", "torn", "sums", "readme", "provenance", "context"],
)
def test_other_damage_is_found_and_named(store_copy: Path, damage: str) -> None:
    path = shards(store_copy)[3]
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-1])
    elif damage == "missing":
        path.unlink()
    elif damage == "foreign":
        path = path.with_name("notes.txt")
        path.write_text("x")
    elif damage == "line":
        path = store_copy / "manifest/train/0-000000.jsonl"
        path.write_text("".join(path.read_text().splitlines(keepends=True)[1:]))
    elif damage == "sums":
        path = store_copy / "data.zarr/layers.0.mlp/input/zarr.json"
        text = path.read_text()
        at = text.index('"channel_sum": [') + 25
        digit = next(i for i in range(at, len(text)) if text[i].isdigit() and text[i] != "9")
        path.write_text(text[:digit] + "9" + text[digit + 1 :])
    elif damage == "torn":
        path = store_copy / "manifest/held_out/0-000003.jsonl"
        path.write_text(path.read_text()[:-10])
    elif damage == "readme":
        path = store_copy / "README.md"
        path.unlink()
    elif damage == "provenance":
        path = store_copy / "provenance.json"
        path.write_text(path.read_text().replace("stdlib", "stdlob"))
    else:
        path = store_copy / "data.zarr/zarr.json"
        path.write_text(path.read_text().replace('"context": 32', '"context": 64'))
    problems = list(verify(store_copy))
    assert problems and path.name in " ".join(problems)

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import zarr

from bsc.cache.store.channel_sums import ChannelSums
from bsc.cache.store.folder import LocalFolder
from bsc.cache.store.layout import DATA, ArraySpec, Grid, shard_key
from bsc.cache.store.shard import ShardWriter, map_shard
from bsc.errors import StoreError
from bsc.records import record_hash

SPEC = ArraySpec("h/input", "bfloat16", 6, ("row", "channel"))
GRID = Grid(shard_rows=32, chunk_rows=8, shards=2)


def shard_path(root: Path, spec: ArraySpec, shard: int) -> Path:
    return root / shard_key(spec, shard)


def every_bfloat16(rows: int) -> Any:
    bits = np.arange(rows * 6, dtype=np.uint16) * 341  # walks through all exponents, NaN and inf
    return bits.view(ml_dtypes.bfloat16).reshape(rows, 6)


def write(root: Path, rows: np.ndarray, shard: int = 0, piece: int = 5) -> ShardWriter:
    writer = ShardWriter(LocalFolder(root), SPEC, GRID, shard)
    for start in range(0, len(rows), piece):
        writer.append(rows[start : start + piece])
    return writer


# zarr compares every chunk with its fill value, NaN included.
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_a_shard_is_byte_identical_to_the_one_zarr_python_writes(tmp_path: Path) -> None:
    rows = every_bfloat16(64)
    ours = tmp_path / "ours"
    for shard in range(2):
        write(ours, rows[32 * shard : 32 * shard + 32], shard).commit(0, None)
    theirs = zarr.create_array(
        tmp_path / "theirs.zarr", shape=(64, 6), dtype=ml_dtypes.bfloat16, chunks=(8, 6),
        shards=(32, 6), compressors=None, fill_value=0, config={"write_empty_chunks": True},
    )  # fmt: skip
    theirs[:] = rows
    for shard in range(2):
        expected = (tmp_path / f"theirs.zarr/c/{shard}/0").read_bytes()
        assert shard_path(ours, SPEC, shard).read_bytes() == expected


def test_zarr_writes_the_metadata_that_we_write(tmp_path: Path) -> None:
    zarr.create_array(
        tmp_path / "a.zarr", shape=(64, 6), dtype=ml_dtypes.bfloat16, chunks=(8, 6), shards=(32, 6),
        compressors=None, fill_value=float("nan"), dimension_names=("row", "channel"),
    )  # fmt: skip
    theirs = json.loads((tmp_path / "a.zarr/zarr.json").read_text())
    ours = SPEC.zarr_json(64, GRID, {})
    assert ours["attributes"].pop("xxh3_128") == record_hash(ours)
    theirs.pop("storage_transformers", None)
    assert ours == theirs


def test_a_mapped_shard_has_the_bits_that_were_appended(tmp_path: Path) -> None:
    rows = every_bfloat16(32)
    write(tmp_path, rows, piece=3).commit(0, None)
    mapped = map_shard(shard_path(tmp_path, SPEC, 0), SPEC, GRID).rows
    assert np.array_equal(mapped.view(np.uint16), rows.view(np.uint16))


def test_nothing_has_the_final_name_before_commit_and_nothing_is_left_after_abort(
    tmp_path: Path,
) -> None:
    writer = write(tmp_path, every_bfloat16(20))
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == ["0.partial"]
    assert np.array_equal(writer.rows_so_far().view(np.uint16), every_bfloat16(20).view(np.uint16))
    writer.abort()
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


def test_sums_leave_out_values_that_are_not_finite_and_count_them() -> None:
    rows = np.array([[1, np.nan], [3, np.inf], [-5, 2]], dtype=ml_dtypes.bfloat16)
    sums = ChannelSums(2)
    sums.add(rows)
    assert sums.sum.tolist() == [-5.0, 2.0]
    assert sums.sum_sq.tolist() == [25.0, 4.0]
    assert (sums.non_finite, sums.non_finite_rows) == (2, 2)


def test_sums_are_right_for_values_whose_squares_float32_cannot_hold() -> None:
    rows = np.full((300, 2), 1e30, dtype=ml_dtypes.bfloat16)
    sums = ChannelSums(2)
    sums.add(rows)
    value = float(rows[0, 0])
    assert sums.non_finite == 0
    assert sums.sum_sq.tolist() == pytest.approx([300 * value**2] * 2, rel=1e-12)


@pytest.mark.parametrize("damage", ["index", "truncated", "missing"])
def test_a_damaged_shard_is_refused_by_name(tmp_path: Path, damage: str) -> None:
    write(tmp_path, every_bfloat16(32)).commit(0, None)
    path = shard_path(tmp_path, SPEC, 0)
    raw = bytearray(path.read_bytes())
    if damage == "index":
        raw[-20] ^= 1
        path.write_bytes(raw)
    elif damage == "truncated":
        path.write_bytes(raw[:-100])
    else:
        path.unlink()
    with pytest.raises(StoreError, match=str(tmp_path / DATA)):
        map_shard(path, SPEC, GRID)

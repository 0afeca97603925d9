"""A reader and a checker written from docs/format.md alone: json, numpy, hashes, nothing of bsc."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numcodecs
import numpy as np
import pytest
import xxhash

from bsc.cache.store.kinds import CODECS, Codec
from bsc.cache.store.layout import Grid
from bsc.cache.store.store import ActivationStore
from tests.cache.synthetic import make_store

PAGE = (Path(__file__).parent.parent.parent / "docs/format.md").read_text()


def crc32c(data: bytes) -> int:
    """Castagnoli, reflected, as its definition has it."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def array_of(folder: Path) -> np.ndarray:
    """An array by section Arrays and A shard; bfloat16 as float32."""
    meta = json.loads((folder / "zarr.json").read_text())
    shape, (sharding,) = meta["shape"], meta["codecs"]
    shard_shape = meta["chunk_grid"]["configuration"]["chunk_shape"]
    chunk_shape = sharding["configuration"]["chunk_shape"]
    chunk_codecs = [c["name"] for c in sharding["configuration"]["codecs"]]
    assert sharding["configuration"]["index_location"] == "end"
    chunks = shard_shape[0] // chunk_shape[0]
    kinds = {"bfloat16": "<u2", "uint32": "<u4", "uint64": "<u8", "int8": "i1", "float32": "<f4"}
    parts = []
    for k in range(shape[0] // shard_shape[0]):
        raw = (folder / "c" / str(k) / ("0" if len(shape) == 2 else "")).read_bytes()
        footer = raw[-(16 * chunks + 4) :]
        assert int.from_bytes(footer[-4:], "little") == crc32c(footer[:-4])
        index = np.frombuffer(footer[:-4], "<u8").reshape(chunks, 2)
        end = 0
        for offset, length in index.tolist():
            assert offset == end  # in order, without gaps
            end = offset + length
            chunk = raw[offset:end]
            if "blosc" in chunk_codecs:
                chunk = numcodecs.Blosc().decode(chunk)
            parts.append(np.frombuffer(chunk, kinds[meta["data_type"]]).reshape(chunk_shape))
        assert end == len(raw) - len(footer)
    whole = np.concatenate(parts)
    if meta["data_type"] == "bfloat16":
        return (whole.astype("<u4") << 16).view("<f4")
    return whole


def activations_of(data: Path, name: str, codec: str) -> np.ndarray:
    """Rows as float32 by section Codecs."""
    if codec != "int8":
        return array_of(data / name)
    meta = json.loads((data / name / "zarr.json").read_text())
    channel = np.array(meta["attributes"]["channel_scale"], np.float32)
    q, row = array_of(data / name), array_of(data / f"{name}_row_scale")
    exact = q.astype(np.float32) * row[:, None] * channel
    # Round to bfloat16: to nearest, ties to even.
    bits = exact.view(np.uint32)
    rounded: np.ndarray = (bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000
    return rounded.view(np.float32)


def canonical(value: Any, indent: int | None = 2) -> str:
    return json.dumps(value, indent=indent, sort_keys=True, allow_nan=False) + "\n"


def manifest_lines(root: Path, split: str) -> Iterator[dict[str, Any]]:
    """Section Manifest, with the hash of each file checked."""
    for path in sorted((root / "manifest" / split).iterdir()):
        *lines, last = path.read_text().splitlines(keepends=True)
        end = json.loads(last)
        digest = end.pop("xxh3_128")
        assert xxhash.xxh3_128_hexdigest(("".join(lines) + canonical(end, None)).encode()) == digest
        assert path.name == f"{end['rank']}-{end['window']:06d}.jsonl"
        yield from map(json.loads, lines)


@pytest.mark.parametrize("codec", CODECS)
def test_a_reader_written_from_the_page_reads_every_codec(tmp_path: Path, codec: Codec) -> None:
    root = tmp_path / "acts"
    make_store(root, 960, Grid(96, 24, 10), window=4, codec=codec)
    data = root / "data.zarr"
    attributes = json.loads((data / "zarr.json").read_text())["attributes"]["activation_store"]
    assert attributes["version"] == 3 and attributes["codec"] == codec
    split = ActivationStore(root).train
    for hook in attributes["hookpoints"]:
        for side, width in (("input", hook["d_in"]), ("output", hook["d_out"])):
            name = f"{hook['name']}/{side}"
            rows = activations_of(data, name, codec)
            ours = np.concatenate([split.tensor(name, i).float().numpy() for i in range(10)])
            assert rows.shape == (960, width) and np.array_equal(rows, ours)
            said = json.loads((data / name / "zarr.json").read_text())["attributes"]
            if codec != "int8":
                assert np.allclose(said["channel_sum"], rows.sum(0, dtype=np.float64))
                squares = np.square(rows, dtype=np.float64).sum(0)
                assert np.allclose(said["channel_sum_sq"], squares)
    ids = array_of(data / "tokens/token_id")
    assert sorted(ids) == list(range(960))
    if codec == "raw":  # the same rows in every array
        x = activations_of(data, "layers.0.mlp/input", codec)
        assert np.array_equal(x[:, 0] + 128 * x[:, 1], ids)


def test_the_scatter_of_the_page_says_where_every_row_went(tmp_path: Path) -> None:
    """Section Order of rows, replayed: blocks of 37 rows, windows of 4, 3 and 3 shards."""
    make_store(tmp_path / "acts", 960, Grid(96, 24, 10), window=4)
    stored = array_of(tmp_path / "acts/data.zarr/tokens/token_id").reshape(10, 96)
    bounds = [10 * (i + 1) // 3 - 10 * i // 3 for i in range(3)]
    shards: list[list[int]] = [[] for _ in range(10)]
    window = block = taken = first = 0
    for start in range(0, 960, 37):
        rows = list(range(start, min(start + 37, 960)))
        while rows:
            n = bounds[window]
            here = rows[: n * 96 - taken]
            rows = rows[len(here) :]
            philox = np.random.Philox(key=[3, window], counter=[0, 0, 0, block])
            order = np.random.Generator(philox).permutation(len(here))
            for place, i in enumerate(order):
                shards[first + (taken + place) % n].append(here[i])
            block += 1
            taken += len(here)
            if taken == n * 96:
                first, window, block, taken = first + n, window + 1, 0, 0
    assert [s.tolist() for s in stored] == shards


def test_the_manifest_of_the_page_has_the_hashes_of_the_files(tmp_path: Path) -> None:
    root = tmp_path / "acts"
    make_store(root, 960, Grid(96, 24, 10), window=4, codec="lz4")
    lines = list(manifest_lines(root, "train"))
    assert len(lines) == 10 * 6
    for line in lines:
        path = root / "data.zarr" / line["array"] / "c" / str(line["shard"])
        raw = (path / "0" if path.is_dir() else path).read_bytes()
        assert (len(raw), xxhash.xxh3_128_hexdigest(raw)) == (line["bytes"], line["xxh3_128"])
        index = np.frombuffer(raw[-(16 * 4 + 4) : -4], "<u8").reshape(4, 2).tolist()
        assert line["chunk_xxh3_64"] == [xxhash.xxh3_64_hexdigest(raw[o : o + n]) for o, n in index]
    provenance = json.loads((root / "provenance.json").read_text())
    digest = provenance.pop("xxh3_128")
    assert xxhash.xxh3_128_hexdigest(canonical(provenance).encode()) == digest


def test_the_page_names_every_key_that_a_store_has(store_path: Path) -> None:
    provenance = json.loads((store_path / "provenance.json").read_text())
    group = json.loads((store_path / "data.zarr/zarr.json").read_text())
    line = next(manifest_lines(store_path, "train"))
    keys = {*provenance, *provenance["capture"], *provenance["completed"], *line}
    keys |= {*group["attributes"]["activation_store"], *provenance["capture"]["model"]}
    missing = sorted(key for key in keys if f"`{key}`" not in PAGE)
    assert not missing

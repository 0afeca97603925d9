"""What is where in a store: names, paths and the metadata of its arrays (docs/format.md).

Pure functions from a description of the store to paths and JSON; nothing here reads or writes.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import ml_dtypes
import numpy as np

from bsc.files import canonical_json

__all__ = [
    "DATA",
    "FORMAT_VERSION",
    "MANIFEST",
    "PROVENANCE",
    "SPLITS",
    "TOKEN_ARRAYS",
    "ArraySpec",
    "Grid",
    "Hookpoint",
    "Split",
    "array_specs",
    "group_json",
    "shard_path",
    "store_attributes",
    "store_id_of",
]

FORMAT_VERSION = 1
DATA = "data.zarr"
MANIFEST = "manifest.jsonl"
PROVENANCE = "provenance.json"
TOKEN_ARRAYS = ("token_id", "doc_id", "position")

Split = Literal["train", "held_out"]
SPLITS: tuple[Split, ...] = ("train", "held_out")

MAX_SHARD_ROWS = 262_144
CHUNK_ROWS = 4_096
PAGE_ROWS = 2_048
"""Chunks of a multiple of this many rows begin on a page boundary whatever the width."""
MAX_DROPPED = 0.01
"""Largest share of the rows asked for that the grid may leave out."""


@dataclass(frozen=True)
class Hookpoint:
    """A module of the model, named relative to the base model, and the widths of its rows."""

    name: str
    d_in: int
    d_out: int


@dataclass(frozen=True)
class Grid:
    """The division of the rows of one split into shards and of a shard into chunks."""

    shard_rows: int
    chunk_rows: int
    shards: int

    def __post_init__(self) -> None:
        assert self.shard_rows % self.chunk_rows == 0 and self.shards >= 1

    @property
    def rows(self) -> int:
        """Rows of the whole split once every shard is there."""
        return self.shard_rows * self.shards

    @property
    def chunks(self) -> int:
        """Chunks per shard."""
        return self.shard_rows // self.chunk_rows

    @classmethod
    def for_rows(cls, rows: int, *, min_shards: int = 1) -> Grid:
        """The largest shards that leave out at most 1 % of `rows`.

        At least `min_shards` shards where that many are possible: a scatter over few shards
        shuffles little.

        >>> Grid.for_rows(10_000_000_000)
        Grid(shard_rows=262144, chunk_rows=4096, shards=38146)
        >>> Grid.for_rows(1_000_000, min_shards=16)
        Grid(shard_rows=55296, chunk_rows=2048, shards=18)
        >>> Grid.for_rows(5_000, min_shards=16)
        Grid(shard_rows=312, chunk_rows=312, shards=16)
        """
        assert rows >= 1
        largest = max(1, min(MAX_SHARD_ROWS, rows // min_shards))
        for shard in range(largest // PAGE_ROWS * PAGE_ROWS, 0, -PAGE_ROWS):
            if rows % shard <= MAX_DROPPED * rows:
                chunk = CHUNK_ROWS if shard % CHUNK_ROWS == 0 else PAGE_ROWS
                return cls(shard, chunk, rows // shard)
        while rows % largest > MAX_DROPPED * rows:
            largest -= 1
        return cls(largest, largest, rows // largest)


@dataclass(frozen=True)
class ArraySpec:
    """One array of one split: path inside data.zarr, type, and width (None: one value a row)."""

    path: str
    dtype: Literal["bfloat16", "uint32"]
    width: int | None
    dimension_names: tuple[str, ...]

    @property
    def numpy_dtype(self) -> np.dtype[Any]:
        """Type of the values in memory."""
        return np.dtype(ml_dtypes.bfloat16 if self.dtype == "bfloat16" else np.uint32)

    @property
    def row_bytes(self) -> int:
        """Bytes of one row on disk."""
        return self.numpy_dtype.itemsize * (self.width or 1)

    def shard_bytes(self, grid: Grid) -> int:
        """Size of a shard's file: rows, index, checksum."""
        return grid.shard_rows * self.row_bytes + 16 * grid.chunks + 4

    def row_shape(self, rows: int) -> tuple[int, ...]:
        """Shape of `rows` rows."""
        return (rows,) if self.width is None else (rows, self.width)

    def zarr_json(self, rows: int, grid: Grid, attributes: dict[str, Any]) -> dict[str, Any]:
        """Zarr v3 metadata of the array with `rows` committed rows."""
        little = {"name": "bytes", "configuration": {"endian": "little"}}
        return {
            "zarr_format": 3,
            "node_type": "array",
            "shape": list(self.row_shape(rows)),
            "data_type": self.dtype,
            "chunk_grid": {
                "name": "regular",
                "configuration": {"chunk_shape": list(self.row_shape(grid.shard_rows))},
            },
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
            # A lost shard reads as NaN, not as plausible zeros. Integers have no such value: the
            # largest one is no token, no document and no position.
            "fill_value": "NaN" if self.dtype == "bfloat16" else 2**32 - 1,
            "dimension_names": list(self.dimension_names),
            "codecs": [
                {
                    "name": "sharding_indexed",
                    "configuration": {
                        "chunk_shape": list(self.row_shape(grid.chunk_rows)),
                        "codecs": [little],
                        "index_codecs": [little, {"name": "crc32c"}],
                        "index_location": "end",
                    },
                }
            ],
            "attributes": attributes,
        }


def array_specs(hookpoints: tuple[Hookpoint, ...], split: Split) -> dict[str, ArraySpec]:
    """Every array of a split by its short name, for example ``"layers.3.mlp/input"``.

    The training split lies at the root of data.zarr, the held-out one in a group of its own.
    """
    prefix = "" if split == "train" else f"{split}/"
    specs = {}
    for hook in hookpoints:
        for side, width in (("input", hook.d_in), ("output", hook.d_out)):
            name = f"{hook.name}/{side}"
            specs[name] = ArraySpec(prefix + name, "bfloat16", width, ("row", "channel"))
    for token_array in TOKEN_ARRAYS:
        name = f"tokens/{token_array}"
        specs[name] = ArraySpec(prefix + name, "uint32", None, ("row",))
    return specs


def group_json(attributes: dict[str, Any]) -> dict[str, Any]:
    """Zarr v3 metadata of a group."""
    return {"zarr_format": 3, "node_type": "group", "attributes": attributes}


def store_id_of(identity: dict[str, Any]) -> str:
    """Hash of all that decides the bytes of a store: 16 hexadecimal digits of SHA-256."""
    return hashlib.sha256(canonical_json(identity).encode()).hexdigest()[:16]


def store_attributes(identity: dict[str, Any]) -> dict[str, Any]:
    """What a reader needs, for the root group of data.zarr.

    Args:
        identity: all that decides the bytes of the store; `capture` in provenance.json.
    """
    return {
        "version": FORMAT_VERSION,
        "store_id": store_id_of(identity),
        "model": identity["model"],
        "hookpoints": identity["hookpoints"],
        "splits": sorted(identity["grids"], key=SPLITS.index),
        "context": identity["context"],
        "scatter": {"seed": identity["seed"], "window": identity["window"]},
    }


def shard_path(root: Path, spec: ArraySpec, shard: int) -> Path:
    """File of one shard: the row coordinate, then 0 for the channel where there is one."""
    folder = root / DATA / spec.path / "c"
    return folder / str(shard) if spec.width is None else folder / str(shard) / "0"

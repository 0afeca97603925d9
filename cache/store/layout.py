"""What is where in a store: names, paths and the metadata of its arrays (docs/format.md).

Pure functions from a description of the store to paths and JSON; nothing here reads or writes.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, Literal

import ml_dtypes
import numpy as np

from bsc.cache.store.kinds import SPLITS, Codec, Split
from bsc.files import canonical_json
from bsc.records import record_hash

__all__ = [
    "DATA",
    "FORMAT_VERSION",
    "OVERLAP",
    "PROVENANCE",
    "README",
    "TOKEN_ARRAYS",
    "ArraySpec",
    "Grid",
    "Hookpoint",
    "array_key",
    "array_specs",
    "end_key",
    "group_json",
    "group_keys",
    "shard_key",
    "store_attributes",
    "store_id_of",
    "window_key",
]

FORMAT_VERSION = 3
DATA = "data.zarr"
MANIFEST = "manifest"
PROVENANCE = "provenance.json"
README = "README.md"
OVERLAP = "overlap.bin"
"""Which held-out rows were seen in training, one bit each."""
TOKEN_ARRAYS: dict[str, Literal["uint32", "uint64"]] = {
    "token_id": "uint32", "doc_id": "uint32", "position": "uint32", "ngram": "uint64",
}  # fmt: skip

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
    def for_rows(cls, rows: int, *, min_shards: int = 1, multiple: int = 1) -> Grid:
        """The largest shards that leave out at most 1 % of `rows`.

        At least `min_shards` shards where that many are possible: a scatter over few shards
        shuffles little. A shard holds a multiple of `multiple` rows.

        >>> Grid.for_rows(10_000_000_000)
        Grid(shard_rows=262144, chunk_rows=4096, shards=38146)
        >>> Grid.for_rows(1_000_000, min_shards=16)
        Grid(shard_rows=55296, chunk_rows=2048, shards=18)
        >>> Grid.for_rows(5_000, min_shards=16)
        Grid(shard_rows=312, chunk_rows=312, shards=16)
        >>> Grid.for_rows(5_000, min_shards=16, multiple=100)
        Grid(shard_rows=200, chunk_rows=200, shards=25)
        """
        assert rows >= 1
        rows = max(rows, multiple)
        largest = max(multiple, min(MAX_SHARD_ROWS, rows // min_shards))
        for page, tolerated in ((PAGE_ROWS, MAX_DROPPED), (1, MAX_DROPPED), (1, 1.0)):
            step = math.lcm(page, multiple)
            for shard in range(largest // step * step, 0, -step):
                if rows % shard <= tolerated * rows:
                    chunk = next((c for c in (CHUNK_ROWS, PAGE_ROWS) if shard % c == 0), shard)
                    return cls(shard, chunk, rows // shard)
        raise AssertionError("one shard of all rows always fits")


_DTYPES: dict[str, np.dtype[Any]] = {
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "int8": np.dtype(np.int8),
    "float32": np.dtype(np.float32),
    "uint32": np.dtype(np.uint32),
    "uint64": np.dtype(np.uint64),
}
# A lost shard reads as NaN, not as plausible zeros. Integers have no such value: the largest uint32
# is no token, no document and no position, the largest uint64 no n-gram, -128 no quantised value.
_FILL: dict[str, Any] = {
    "bfloat16": "NaN", "float32": "NaN", "uint32": 2**32 - 1, "uint64": 2**64 - 1, "int8": -128,
}  # fmt: skip


@dataclass(frozen=True)
class ArraySpec:
    """One array of one split: path inside data.zarr, type, width (None: one value a row), codec."""

    path: str
    dtype: Literal["bfloat16", "int8", "float32", "uint32", "uint64"]
    width: int | None
    dimension_names: tuple[str, ...]
    lz4: bool = False
    """Whether chunks are compressed; their sizes then differ and shards cannot be mapped."""

    @property
    def numpy_dtype(self) -> np.dtype[Any]:
        """Type of the values in memory."""
        return _DTYPES[self.dtype]

    @property
    def row_bytes(self) -> int:
        """Bytes of one row, uncompressed."""
        return self.numpy_dtype.itemsize * (self.width or 1)

    def shard_bytes(self, grid: Grid) -> int:
        """Size of a shard's file, uncompressed: rows, index, checksum."""
        return grid.shard_rows * self.row_bytes + 16 * grid.chunks + 4

    def row_shape(self, rows: int) -> tuple[int, ...]:
        """Shape of `rows` rows."""
        return (rows,) if self.width is None else (rows, self.width)

    def zarr_json(self, rows: int, grid: Grid, attributes: dict[str, Any]) -> dict[str, Any]:
        """Zarr v3 metadata of the array with `rows` committed rows.

        Its hash is among the attributes, `xxh3_128`.
        """
        little = {"name": "bytes", "configuration": {"endian": "little"}}
        # The bytes codec of one-byte types has no byte order.
        chunk_codecs: list[dict[str, Any]] = [{"name": "bytes"} if self.dtype == "int8" else little]
        if self.lz4:
            blosc = {
                "typesize": self.numpy_dtype.itemsize, "cname": "lz4", "clevel": 5,
                "shuffle": "bitshuffle", "blocksize": 0,
            }  # fmt: skip
            chunk_codecs.append({"name": "blosc", "configuration": blosc})
        meta = {
            "zarr_format": 3,
            "node_type": "array",
            "shape": list(self.row_shape(rows)),
            "data_type": self.dtype,
            "chunk_grid": {
                "name": "regular",
                "configuration": {"chunk_shape": list(self.row_shape(grid.shard_rows))},
            },
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
            "fill_value": _FILL[self.dtype],
            "dimension_names": list(self.dimension_names),
            "codecs": [
                {
                    "name": "sharding_indexed",
                    "configuration": {
                        "chunk_shape": list(self.row_shape(grid.chunk_rows)),
                        "codecs": chunk_codecs,
                        "index_codecs": [little, {"name": "crc32c"}],
                        "index_location": "end",
                    },
                }
            ],
            "attributes": attributes,
        }
        return meta | {"attributes": attributes | {"xxh3_128": record_hash(meta)}}


ROW_SCALE = "_row_scale"
"""What the array of row scales is called after its array of int8 values."""


def array_specs(
    hookpoints: tuple[Hookpoint, ...], split: Split, codec: Codec = "raw"
) -> dict[str, ArraySpec]:
    """Every array of a split by its short name, for example ``"layers.3.mlp/input"``.

    The training split lies at the root of data.zarr, the held-out one in a group of its own. With
    codec int8 an array of activations is two: the values, and ``"layers.3.mlp/input_row_scale"``.
    """
    prefix = "" if split == "train" else f"{split}/"
    specs = {}
    for hook in hookpoints:
        for side, width in (("input", hook.d_in), ("output", hook.d_out)):
            name = f"{hook.name}/{side}"
            names = ("row", f"{side}_channel")
            if codec == "int8":
                specs[name] = ArraySpec(prefix + name, "int8", width, names)
                scale = name + ROW_SCALE
                specs[scale] = ArraySpec(prefix + scale, "float32", None, ("row",))
            else:
                specs[name] = ArraySpec(prefix + name, "bfloat16", width, names, codec == "lz4")
    for token_array, dtype in TOKEN_ARRAYS.items():
        name = f"tokens/{token_array}"
        specs[name] = ArraySpec(prefix + name, dtype, None, ("row",))
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
    said = {name: identity[name] for name in ("separation",) if name in identity}
    return said | {
        "version": FORMAT_VERSION,
        "store_id": store_id_of(identity),
        "model": identity["model"],
        "hookpoints": identity["hookpoints"],
        "splits": sorted(identity["grids"], key=SPLITS.index),
        "codec": identity["codec"],
        "context": identity["context"],
        "packing": identity["packing"],
        "writers": identity["writers"],
        "ring": identity["ring"],
        "scatter": {"seed": identity["seed"], "window": identity["window"]},
    }


def array_key(spec: ArraySpec) -> str:
    """Metadata of an array."""
    return f"{DATA}/{spec.path}/zarr.json"


def group_keys(specs: Iterable[ArraySpec]) -> list[str]:
    """Metadata of the groups between the root of data.zarr and arrays."""
    parents = {p for spec in specs for p in list(PurePosixPath(spec.path).parents)[:-1]}
    return [f"{DATA}/{p}/zarr.json" for p in sorted(parents)]


def shard_key(spec: ArraySpec, shard: int) -> str:
    """One shard: the row coordinate, then 0 for the channel where there is one."""
    key = f"{DATA}/{spec.path}/c/{shard}"
    return key if spec.width is None else f"{key}/0"


def window_key(split: Split, rank: int, window: int) -> str:
    """Manifest of one committed window of one writer."""
    return f"{MANIFEST}/{split}/{rank}-{window:06d}.jsonl"


def end_key(rank: int) -> str:
    """What a writer says when its part is finished."""
    return f"{MANIFEST}/end-{rank}.json"

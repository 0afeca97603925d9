"""Reading a store: what it is, its rows, its sums.

`ActivationStore` opens a folder in constant time whatever its size: it reads the metadata of the
arrays and no manifest. Rows come from mapped shards; nothing is loaded before it is touched.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bsc.cache.layout import (
    DATA,
    FORMAT_VERSION,
    MANIFEST,
    PROVENANCE,
    SPLITS,
    ArraySpec,
    Grid,
    Hookpoint,
    Split,
    array_specs,
    shard_path,
)
from bsc.cache.shard import ChannelSums, ShardRecord, map_shard
from bsc.errors import StoreError, nearest

__all__ = ["ActivationStore", "Moments", "StoreSplit"]


@dataclass(frozen=True)
class Moments:
    """Mean and variance of the rows of one array, per channel, from the sums of its shards."""

    rows: int
    mean: torch.Tensor
    """(width,), float64."""
    variance: torch.Tensor
    """(width,), float64, of the population (divided by rows)."""

    @property
    def total_variance(self) -> float:
        """Mean squared distance of a row from the mean row: the sum of `variance`."""
        return float(self.variance.sum())


def _read_json(path: Path, what: str) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        raise StoreError(f"{path.parent}: no {what} here ({path.name} is missing).") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise StoreError(f"{path}: cannot be read as JSON ({error}).") from None
    if not isinstance(value, dict):
        raise StoreError(f"{path}: expected a JSON object, found {type(value).__name__}.")
    return value


class StoreSplit:
    """The committed rows of one split."""

    def __init__(self, root: Path, split: Split, hookpoints: tuple[Hookpoint, ...]) -> None:
        """Read the metadata of every array.

        Raises:
            StoreError: the metadata is missing, damaged, or not that of a store of this version.
        """
        self.root, self.split = root, split
        self.specs = array_specs(hookpoints, split)
        self._attributes: dict[str, dict[str, Any]] = {}
        self._rows: dict[str, int] = {}
        """Rows by array: between two commits they may be one shard apart."""
        grids = set()
        for name, spec in self.specs.items():
            path = root / DATA / spec.path / "zarr.json"
            meta = _read_json(path, "array")
            try:
                shard = int(meta["chunk_grid"]["configuration"]["chunk_shape"][0])
                chunk = int(meta["codecs"][0]["configuration"]["chunk_shape"][0])
                n_rows = int(meta["shape"][0])
                grid = Grid(shard, chunk, max(1, n_rows // shard))
                self._attributes[name] = meta["attributes"]
                expected = spec.zarr_json(n_rows, grid, meta["attributes"])
                if meta != expected:
                    wrong = [k for k in expected if meta.get(k) != expected[k]]
                    raise ValueError(f"unexpected {', '.join(wrong) or 'extra keys'}")
                if spec.width is not None:
                    ChannelSums.from_json(meta["attributes"])
            except (
                KeyError, IndexError, TypeError, ValueError, AssertionError, ZeroDivisionError,
            ) as error:  # fmt: skip
                raise StoreError(
                    f"{path}: not the metadata of an array of a bsc store ({error!r})."
                ) from None
            grids.add((shard, chunk))
            self._rows[name] = n_rows
        if len(grids) != 1:
            raise StoreError(f"{root}: the arrays of split {split!r} have different shard sizes.")
        ((shard, chunk),) = grids
        self.shards = min(self._rows.values()) // shard
        self.grid = Grid(shard, chunk, max(1, self.shards))
        self.rows = self.shards * shard
        self._map = lru_cache(maxsize=256)(self._map_uncached)

    def _map_uncached(self, name: str, shard: int) -> NDArray[Any]:
        spec = self.spec(name)
        return map_shard(shard_path(self.root, spec, shard), spec, self.grid)

    def spec(self, name: str) -> ArraySpec:
        """Description of an array by its short name, for example ``"layers.3.mlp/input"``.

        Raises:
            StoreError: there is no such array.
        """
        if name not in self.specs:
            raise StoreError(
                f"{self.root}: no array {name!r} in split {self.split!r}"
                f"{nearest(name, self.specs)}. It has {', '.join(self.specs)}."
            )
        return self.specs[name]

    def shard(self, name: str, shard: int) -> NDArray[Any]:
        """Rows of one shard, mapped: bfloat16 (shard_rows, width) or uint32 (shard_rows,).

        Raises:
            StoreError: there is no such array, or the file is missing or damaged.
        """
        if not 0 <= shard < self.shards:
            raise StoreError(f"{self.root}: no shard {shard} in split {self.split!r}.")
        return self._map(name, shard)

    def tensor(self, name: str, shard: int) -> torch.Tensor:
        """One shard of activations, mapped: a bfloat16 tensor (shard_rows, width)."""
        return torch.from_numpy(self.shard(name, shard).view(np.int16)).view(torch.bfloat16)

    def batches(self, names: tuple[str, ...], rows: int) -> Iterator[tuple[torch.Tensor, ...]]:
        """All rows in the order of the store, `rows` at a time, within shards.

        Yields:
            One bfloat16 tensor (n, width) per name, views of mapped shards, n <= rows.
        """
        for shard in range(self.shards):
            parts = [self.tensor(name, shard) for name in names]
            for start in range(0, self.grid.shard_rows, rows):
                yield tuple(p[start : start + rows] for p in parts)

    def tokens(self, name: str) -> NDArray[np.uint32]:
        """A whole token array, for example ``"token_id"``: 4 bytes a row in memory."""
        shards = [self.shard(f"tokens/{name}", i) for i in range(self.shards)]
        return np.concatenate(shards) if shards else np.empty(0, np.uint32)

    def sums(self, name: str) -> ChannelSums:
        """Channel sums of an activation array, over `summed_rows(name)` rows."""
        self.spec(name)
        return ChannelSums.from_json(self._attributes[name])

    def summed_rows(self, name: str) -> int:
        """Rows that an array has, and its sums are over: those of the split, or one shard more."""
        self.spec(name)
        return self._rows[name]

    def moments(self, name: str) -> Moments:
        """Mean and variance per channel of an activation array.

        Raises:
            StoreError: there is no such array, it has no rows, or values that are not finite.
        """
        sums = self.sums(name)
        if self.rows == 0:
            raise StoreError(f"{self.root}: split {self.split!r} has no committed rows yet.")
        if sums.non_finite:
            raise StoreError(
                f"{self.root}: {name} holds {sums.non_finite:,} values that are not finite. The "
                f"model overflowed: capture again with --dtype float32."
            )
        rows = self.summed_rows(name)
        mean = sums.sum / rows
        variance = np.maximum(sums.sum_sq / rows - mean**2, 0.0)
        return Moments(rows, torch.from_numpy(mean), torch.from_numpy(variance))

    @property
    def non_finite(self) -> int:
        """Values of all arrays that are not finite."""
        return sum(int(a.get("non_finite", 0)) for a in self._attributes.values())


class ActivationStore:
    """An activation store on disk, opened for reading.

    `ActivationStore("acts").train.tensor("layers.3.mlp/input", 0)` is the first shard of the inputs
    of a hookpoint, mapped.
    """

    def __init__(self, root: str | Path) -> None:
        """Open the store in folder `root`.

        Raises:
            StoreError: there is no store, or it is one that this version of bsc cannot read.
        """
        self.root = Path(root)
        if not self.root.is_dir():
            raise StoreError(f"{self.root}: no such folder. Make a store with `bsc cache` first.")
        if not (self.root / DATA / "zarr.json").exists():
            raise StoreError(
                f"{self.root}: not an activation store ({DATA}/zarr.json is missing). Name the "
                f"folder that `bsc cache --store` wrote."
            )
        group = _read_json(self.root / DATA / "zarr.json", "store")
        try:
            self.attributes: dict[str, Any] = dict(group["attributes"]["activation_store"])
            version = int(self.attributes["version"])
            self.hookpoints = tuple(
                Hookpoint(str(h["name"]), int(h["d_in"]), int(h["d_out"]))
                for h in self.attributes["hookpoints"]
            )
            self.store_id = str(self.attributes["store_id"])
            self.context = int(self.attributes["context"])
            splits = tuple(s for s in SPLITS if s in self.attributes["splits"])
        except (KeyError, TypeError, ValueError) as error:
            raise StoreError(
                f"{self.root / DATA / 'zarr.json'}: a Zarr group, but not that of an activation "
                f"store ({error!r})."
            ) from None
        if version != FORMAT_VERSION:
            raise StoreError(
                f"{self.root}: the store has format version {version}, this bsc reads version "
                f"{FORMAT_VERSION}. CHANGELOG.md says which release reads it."
            )
        for hook in self.hookpoints:
            if hook.name.startswith(("/", ".")) or "/" in hook.name:
                raise StoreError(f"{self.root}: {hook.name!r} is no name of a hookpoint.")
        self.splits: dict[Split, StoreSplit] = {
            s: StoreSplit(self.root, s, self.hookpoints) for s in splits
        }
        if "train" not in self.splits:
            raise StoreError(f"{self.root}: the store has no training rows.")

    @property
    def train(self) -> StoreSplit:
        """The shuffled rows that coders are trained on."""
        return self.splits["train"]

    @property
    def held_out(self) -> StoreSplit:
        """The rows of held-out documents, in the order of the text.

        Raises:
            StoreError: the store has none.
        """
        if "held_out" not in self.splits or self.splits["held_out"].rows == 0:
            raise StoreError(
                f"{self.root}: the store has no held-out rows, which evaluation needs. Capture "
                f"with --held-out above 0, or more text."
            )
        return self.splits["held_out"]

    def hookpoint(self, name: str) -> Hookpoint:
        """The hookpoint called `name`.

        Raises:
            StoreError: there is no such hookpoint; the message names those there are.
        """
        for hook in self.hookpoints:
            if hook.name == name:
                return hook
        names = [h.name for h in self.hookpoints]
        raise StoreError(
            f"{self.root}: no hookpoint {name!r}{nearest(name, names)}. The store has "
            f"{', '.join(names)}."
        )

    def provenance(self) -> dict[str, Any]:
        """How the store was made.

        Raises:
            StoreError: provenance.json is missing or damaged.
        """
        return _read_json(self.root / PROVENANCE, "provenance")

    @property
    def complete(self) -> bool:
        """Whether the capture that writes the store has ended."""
        return "completed" in self.provenance()

    def records(self) -> Iterator[ShardRecord]:
        """The lines of the manifest.

        Raises:
            StoreError: the manifest is missing or a line is damaged.
        """
        path = self.root / MANIFEST
        try:
            with path.open() as lines:
                for number, line in enumerate(lines, 1):
                    try:
                        yield ShardRecord.from_json(json.loads(line))
                    except (KeyError, TypeError, ValueError) as error:
                        raise StoreError(
                            f"{path}, line {number}: not a line of a manifest ({error!r})."
                        ) from None
        except (FileNotFoundError, UnicodeDecodeError) as error:
            raise StoreError(f"{path}: cannot be read ({error}).") from None

    @property
    def bytes(self) -> int:
        """Bytes of all committed shards."""
        return sum(
            s.shards * spec.shard_bytes(s.grid)
            for s in self.splits.values()
            for spec in s.specs.values()
        )

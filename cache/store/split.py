"""The committed rows of one split of a store: mapped shards, tokens, sums and moments."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from bsc.cache.store.channel_sums import ChannelSums
from bsc.cache.store.check import ShardChecks
from bsc.cache.store.folder import StoreFolder
from bsc.cache.store.kinds import Codec, Split
from bsc.cache.store.layout import (
    ROW_SCALE,
    ArraySpec,
    Grid,
    Hookpoint,
    array_key,
    array_specs,
    shard_key,
)
from bsc.cache.store.manifest import parse_array_json, read_json
from bsc.cache.store.shard import decode_shard, map_shard
from bsc.cache.store.shard_rows import MappedTensor, QuantisedRows, ShardRows
from bsc.errors import StoreError, nearest

if TYPE_CHECKING:
    from bsc.cache.store.dataset import RowDataset

__all__ = ["Moments", "StoreSplit"]

_MAPPED = 64
"""Shards that stay mapped for repeated reading."""


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


class StoreSplit:
    """The committed rows of one split."""

    def __init__(
        self,
        folder: StoreFolder,
        split: Split,
        hookpoints: tuple[Hookpoint, ...],
        codec: Codec,
        *,
        check: bool = True,
    ) -> None:
        """Read the metadata of every array.

        Args:
            folder: the store.
            split: of its splits.
            hookpoints: of the store.
            codec: of the store.
            check: whether shards are compared with the manifest when they are first read.

        Raises:
            StoreError: the metadata is missing, damaged, or not that of a store of this version.
        """
        self.folder, self.split, self.codec, self.check = folder, split, codec, check
        self.specs = array_specs(hookpoints, split, codec)
        self._checks = ShardChecks(folder, split) if check else None
        self._map = lru_cache(maxsize=_MAPPED)(self._map_uncached)
        self.refresh()

    def __repr__(self) -> str:
        arrays = ", ".join(n for n, spec in self.specs.items() if spec.width is not None)
        return (
            f"<StoreSplit {self.split!r} of {self.where}: {self.rows:,} rows in {self.shards} "
            f"shards; {arrays}>"
        )

    def refresh(self) -> None:
        """Read again how many rows are committed, while a capture writes the store.

        Raises:
            StoreError: as at opening.
        """
        self._attributes: dict[str, dict[str, Any]] = {}
        self._rows: dict[str, int] = {}
        """Rows by array: between two commits they may be one shard apart."""
        grids = set()
        for name, spec in self.specs.items():
            key = array_key(spec)
            meta = read_json(self.folder, key, "array")
            n_rows, attributes = parse_array_json(meta, f"{self.folder}/{key}")
            try:
                shard = int(meta["chunk_grid"]["configuration"]["chunk_shape"][0])
                chunk = int(meta["codecs"][0]["configuration"]["chunk_shape"][0])
                grid = Grid(shard, chunk, max(1, n_rows // shard))
                self._attributes[name] = attributes
                if n_rows % shard:
                    raise ValueError(f"{n_rows} rows are no whole shards of {shard}")
                expected = spec.zarr_json(n_rows, grid, attributes)
                if meta != expected:
                    wrong = [k for k in expected if meta.get(k) != expected[k]]
                    raise ValueError(f"unexpected {', '.join(wrong) or 'extra keys'}")
                if spec.width is not None:
                    sums = ChannelSums.from_json(attributes)
                    if sums.width != spec.width:
                        raise ValueError(f"{sums.width} channel sums")
                if spec.dtype == "int8":
                    scale = np.asarray(attributes["channel_scale"], np.float32)
                    if scale.shape != (spec.width,) or not np.isfinite(scale).all():
                        raise ValueError("channel_scale of another width, or not finite")
            except (
                KeyError,
                IndexError,
                TypeError,
                ValueError,
                AssertionError,
                ZeroDivisionError,
            ) as error:
                raise StoreError(
                    f"{self.folder}/{key}: not the metadata of an array of a bsc store ({error!r})."
                ) from None
            grids.add((shard, chunk))
            self._rows[name] = n_rows
        if len(grids) != 1:
            raise StoreError(
                f"{self.folder}: the arrays of split {self.split!r} have different shard sizes."
            )
        ((shard, chunk),) = grids
        self.shards = min(self._rows.values()) // shard
        self.grid = Grid(shard, chunk, max(1, self.shards))
        self.rows = self.shards * shard

    @property
    def where(self) -> str:
        """The store, for messages."""
        return str(self.folder)

    def _map_uncached(self, name: str, shard: int) -> NDArray[Any]:
        return self._read(self.spec(name), shard).rows

    def _read(self, spec: ArraySpec, shard: int) -> MappedTensor:
        """Rows of one shard as they are stored, mapped where that is possible."""
        key = shard_key(spec, shard)
        for attempt in range(3):
            try:
                path = self.folder.local(key)
            except FileNotFoundError:
                break
            try:
                if spec.lz4:
                    if self._checks is not None:
                        self._checks.check(spec, shard, path.read_bytes)
                    return MappedTensor(decode_shard(path, spec, self.grid), None, path)
                mapped = MappedTensor(*map_shard(path, spec, self.grid), path)
                if self._checks is not None and not self._checks.is_done(spec, shard):
                    mapped.load()  # in one piece, rather than page by page
                    self._checks.check(spec, shard, mapped.mapping)
                return mapped
            except FileNotFoundError:  # the copy went out of a full cache
                continue
            except StoreError:
                if path.exists() or attempt == 2:  # else the copy went out of a full cache
                    raise
        raise StoreError(f"{self.folder}/{key}: this committed shard is missing.")

    def spec(self, name: str) -> ArraySpec:
        """Description of an array by its short name, for example ``"layers.3.mlp/input"``.

        Raises:
            StoreError: there is no such array.
        """
        if name not in self.specs:
            raise StoreError(
                f"{self.folder}: no array {name!r} in split {self.split!r}"
                f"{nearest(name, self.specs)}. It has {', '.join(self.specs)}."
            )
        return self.specs[name]

    def fetch(self, names: Iterable[str], shards: Iterable[int]) -> None:
        """Have shards of activations at hand that are read next, several at a time where they come
        from elsewhere."""
        specs = [self.spec(name) for name in names]
        if self.codec == "int8":
            specs += [self.spec(name + ROW_SCALE) for name in names]
        self.folder.fetch([shard_key(spec, shard) for shard in shards for spec in specs])

    def _check_shard(self, shard: int) -> None:
        if not 0 <= shard < self.shards:
            raise StoreError(f"{self.folder}: no shard {shard} in split {self.split!r}.")

    def shard(self, name: str, shard: int) -> NDArray[Any]:
        """Rows of one shard as they are stored: (shard_rows, width) or (shard_rows,).

        bfloat16 or int8 for activations, uint32 or uint64 for tokens, float32 for row scales.
        Mapped, but for activations of codec lz4, which are decoded at each call.

        Raises:
            StoreError: there is no such array, or the file is missing or damaged.
        """
        self._check_shard(shard)
        return self._map_uncached(name, shard) if self.spec(name).lz4 else self._map(name, shard)

    def shard_rows(self, name: str, shard: int) -> ShardRows:
        """One shard of activations for reading chosen rows, whatever the codec.

        Raises:
            StoreError: there is no such array, or the file is missing or damaged.
        """
        self._check_shard(shard)
        values = self._read(self.spec(name), shard)
        if self.codec != "int8":
            return values
        scales = self._read(self.spec(name + ROW_SCALE), shard)
        channels = torch.tensor(self._attributes[name]["channel_scale"], dtype=torch.float32)
        return QuantisedRows(values, scales, channels)

    def tensor(self, name: str, shard: int) -> torch.Tensor:
        """One shard of activations: a bfloat16 tensor (shard_rows, width).

        Mapped with codec raw, decoded in memory with the others.
        """
        return self.shard_rows(name, shard).part(0, self.grid.shard_rows)

    def batches(self, names: tuple[str, ...], rows: int) -> Iterator[tuple[torch.Tensor, ...]]:
        """All rows in the order of the store, `rows` at a time, within shards.

        Yields:
            One bfloat16 tensor (n, width) per name, views of mapped shards, n <= rows.
        """
        for shard in range(self.shards):
            parts = [self.shard_rows(name, shard) for name in names]
            for start in range(0, self.grid.shard_rows, rows):
                stop = min(start + rows, self.grid.shard_rows)
                yield tuple(part.part(start, stop) for part in parts)

    def dataset(
        self,
        hookpoint: str,
        *,
        batch_rows: int,
        sides: Sequence[str] = ("input", "output"),
        **more: Any,
    ) -> RowDataset:
        """Rows of a hookpoint as a dataset of torch, an epoch at each iteration.

        Args:
            hookpoint: of the store, for example ``"layers.3.mlp"``.
            batch_rows: rows in a batch, which is a tuple of one bfloat16 tensor for each side.
            sides: ``"input"``, ``"output"`` or both.
            more: as for `bsc.cache.store.dataset.RowDataset`: shuffle, seed, rank and others.

        Raises:
            StoreError: there is no such hookpoint.
            ConfigError: the split cannot be read like this.
        """
        from bsc.cache.store.dataset import RowDataset

        names = [f"{hookpoint}/{s}" for s in ((sides,) if isinstance(sides, str) else sides)]
        return RowDataset(self, names, batch_rows=batch_rows, **more)

    def tokens(self, name: str) -> NDArray[Any]:
        """A whole token array, for example ``"token_id"``: 4 bytes a row in memory, or 8."""
        shards = [self.shard(f"tokens/{name}", i) for i in range(self.shards)]
        kind = self.spec(f"tokens/{name}").numpy_dtype
        return np.concatenate(shards) if shards else np.empty(0, kind)

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
            raise StoreError(f"{self.folder}: split {self.split!r} has no committed rows yet.")
        rows = self.summed_rows(name) - sums.non_finite_rows
        if rows < 1:
            raise StoreError(
                f"{self.folder}: {name} holds no row whose values are all finite. The model "
                f"overflowed: capture again with --dtype float32."
            )
        mean = sums.sum / rows
        variance = np.maximum(sums.sum_sq / rows - mean**2, 0.0)
        return Moments(rows, torch.from_numpy(mean), torch.from_numpy(variance))

    @property
    def non_finite(self) -> int:
        """Values of all arrays that are not finite."""
        return sum(int(a.get("non_finite", 0)) for a in self._attributes.values())

    def non_finite_rows(self, name: str) -> int:
        """Rows of an array with a value that is not finite."""
        return self.sums(name).non_finite_rows

"""Reading a store: what it is, its rows, its sums.

`ActivationStore` opens a folder in constant time whatever its size: it reads the metadata of the
arrays and no manifest. Rows come from mapped shards; nothing is loaded before it is touched.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from bsc.cache.store.folder import open_folder
from bsc.cache.store.kinds import CODECS, SPLITS, Codec, Split
from bsc.cache.store.layout import (
    DATA,
    FORMAT_VERSION,
    OVERLAP,
    PROVENANCE,
    Hookpoint,
    store_attributes,
)
from bsc.cache.store.manifest import read_json, read_provenance, windows
from bsc.cache.store.ring_room import RingRoom
from bsc.cache.store.shard import ShardRecord
from bsc.cache.store.split import StoreSplit
from bsc.errors import StoreError, nearest

__all__ = ["ActivationStore"]


class ActivationStore:
    """An activation store on disk, opened for reading.

    `ActivationStore("acts").train.tensor("layers.3.mlp/input", 0)` is the first shard of the inputs
    of a hookpoint, mapped.
    """

    def __init__(self, root: str | Path, *, check: bool = True) -> None:
        """Open the store in folder `root`.

        Args:
            root: the folder, or an address in object storage.
            check: whether a shard is compared with the manifest when it is first read, which reads
                all of it.

        Raises:
            StoreError: there is no store, or it is one that this version of bsc cannot read.
        """
        self.folder = open_folder(root)
        self.check = check
        self.own_split = True
        """Whether what is read was trained on this store's training rows, so that what the capture
        measured of its held-out text in them says something."""
        if self.folder.missing():
            raise StoreError(f"{self.folder}: no such folder. Make a store with `bsc cache` first.")
        if not self.folder.exists(f"{DATA}/zarr.json"):
            raise StoreError(
                f"{self.folder}: not an activation store ({DATA}/zarr.json is missing)"
                + (", but a run" if self.folder.exists("coders") else "")
                + ". Name the folder that `bsc cache --store` wrote."
            )
        group = read_json(self.folder, f"{DATA}/zarr.json", "store")
        try:
            self.attributes: dict[str, Any] = dict(group["attributes"]["activation_store"])
            version = int(self.attributes["version"])
            self.hookpoints = tuple(
                Hookpoint(str(h["name"]), int(h["d_in"]), int(h["d_out"]))
                for h in self.attributes["hookpoints"]
            )
            self.store_id = str(self.attributes["store_id"])
            self.context = int(self.attributes["context"])
            self.codec: Codec = self.attributes["codec"]
            self.packing = str(self.attributes["packing"])
            self.writers = int(self.attributes["writers"])
            ring = self.attributes["ring"]
            self.ring: int | None = None if ring is None else int(ring)
            if self.codec not in CODECS or not self.hookpoints:
                raise ValueError(f"codec {self.codec!r}, {len(self.hookpoints)} hookpoints")
            splits = tuple(s for s in SPLITS if s in self.attributes["splits"])
        except (KeyError, TypeError, ValueError) as error:
            raise StoreError(
                f"{self.folder}/{DATA}/zarr.json: a Zarr group, but not that of an activation "
                f"store ({error!r})."
            ) from None
        if version != FORMAT_VERSION:
            raise StoreError(
                f"{self.folder}: the store has format version {version}, this bsc reads version "
                f"{FORMAT_VERSION}. CHANGELOG.md says which release reads it."
            )
        if check and self._of_provenance() != self.attributes:
            raise StoreError(
                f"{self.folder}: {DATA}/zarr.json and {PROVENANCE} speak of different stores: one "
                f"of them was changed. Copy them again from where the store is whole."
            )
        for hook in self.hookpoints:
            if hook.name.startswith(("/", ".")) or "/" in hook.name or "\\" in hook.name:
                raise StoreError(f"{self.folder}: {hook.name!r} is no name of a hookpoint.")
        self.splits: dict[Split, StoreSplit] = {
            s: StoreSplit(self.folder, s, self.hookpoints, self.codec, check=check) for s in splits
        }
        if "train" not in self.splits:
            raise StoreError(f"{self.folder}: the store has no training rows.")

    def __repr__(self) -> str:
        rows = ", ".join(f"{s.rows:,} {name} rows" for name, s in self.splits.items())
        hooks = ", ".join(f"{h.name} ({h.d_in} -> {h.d_out})" for h in self.hookpoints)
        model = self.attributes["model"]["name"]
        return f"<ActivationStore {self.folder}: {rows} of {hooks}; {model}>"

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
                f"{self.folder}: the store has no held-out rows, which evaluation needs. Capture "
                f"with --held-out above 0, or more text."
            )
        return self.splits["held_out"]

    def _of_provenance(self) -> dict[str, Any]:
        try:
            return store_attributes(self.provenance()["capture"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise StoreError(f"{self.folder}/{PROVENANCE}: damaged ({error!r}).") from None

    @property
    def planned_rows(self) -> int:
        """Training rows that the capture was asked for, committed or not.

        Raises:
            StoreError: provenance.json is missing or damaged.
        """
        return self.rows_planned("train")

    def rows_planned(self, split: Split) -> int:
        """Rows of a split that the capture was asked for, committed or not.

        Raises:
            StoreError: provenance.json is missing or damaged.
        """
        try:
            grid = self.provenance()["capture"]["grids"][split]
            return int(grid["shards"]) * int(grid["shard_rows"])
        except (KeyError, TypeError, ValueError) as error:
            raise StoreError(f"{self.folder}/{PROVENANCE}: damaged ({error!r}).") from None

    @property
    def room(self) -> RingRoom | None:
        """How far apart writers and readers of a ring can be; None: the store is no ring.

        Raises:
            StoreError: provenance.json is missing or damaged.
        """
        if self.ring is None:
            return None
        try:
            window = int(self.attributes["scatter"]["window"]) * self.writers
        except (KeyError, TypeError, ValueError) as error:
            raise StoreError(f"{self.folder}/{DATA}/zarr.json: damaged ({error!r}).") from None
        rows = self.train.grid.shard_rows
        return RingRoom(self.ring, window, self.planned_rows // rows, rows)

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
            f"{self.folder}: no hookpoint {name!r}{nearest(name, names)}. The store has "
            f"{', '.join(names)}."
        )

    def provenance(self) -> dict[str, Any]:
        """How the store was made.

        Raises:
            StoreError: provenance.json is missing or damaged.
        """
        return read_provenance(self.folder)

    @property
    def overlap(self) -> dict[str, Any] | None:
        """What the capture found of its held-out text in its training rows (capture/overlap.py).

        None where it is not known: the capture has not ended, there are no held-out rows, or what
        is evaluated was trained on another store.

        Raises:
            StoreError: provenance.json is missing or damaged.
        """
        if not self.own_split:
            return None
        found: dict[str, Any] | None = self.provenance().get("completed", {}).get("overlap")
        return found

    def seen_rows(self) -> NDArray[np.bool_] | None:
        """Which held-out rows stand in an n-gram that was trained on, (rows,) (capture/overlap.py).

        None where it is not known: as for `overlap`, and of a ring, whose oldest training rows
        were gone when it was measured.

        Raises:
            StoreError: what the capture measured is missing or damaged.
        """
        said = self.overlap
        if said is None or int(said["train_rows"]) < self.train.rows:
            return None
        try:
            raw = self.folder.read(OVERLAP)
        except FileNotFoundError:
            raise StoreError(f"{self.folder}/{OVERLAP}: missing.") from None
        if xxhash.xxh3_128_hexdigest(raw) != said["xxh3_128"]:
            raise StoreError(
                f"{self.folder}/{OVERLAP}: changed: it has not the hash that {PROVENANCE} states. "
                f"Copy it again from where the store is whole."
            )
        bits = np.unpackbits(np.frombuffer(raw, np.uint8), bitorder="little")
        return bits[: int(said["rows"])].astype(bool)

    @property
    def complete(self) -> bool:
        """Whether the capture that writes the store has ended."""
        return "completed" in self.provenance()

    def records(self, split: Split) -> Iterator[ShardRecord]:
        """The lines of the manifest of a split, writer by writer.

        Raises:
            StoreError: a file of the manifest is damaged.
        """
        for rank in range(self.writers):
            for window in windows(self.folder, split, rank):
                yield from window.shards

    @property
    def bytes(self) -> int:
        """Bytes of all committed shards; lz4 counted as if uncompressed."""
        return sum(
            s.shards * spec.shard_bytes(s.grid)
            for s in self.splits.values()
            for spec in s.specs.values()
        )

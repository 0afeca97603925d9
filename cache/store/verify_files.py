"""The files that a store had when a check of it began, in memory that does not grow by their names.

A large store has half a million shards. Each is a number and a stamp here: a hash of its size and
of when it was last written, which is another one once the file was replaced or written into.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray

from bsc.cache.store.folder import LocalFolder, StoreFolder
from bsc.cache.store.layout import DATA, ArraySpec, shard_key
from bsc.cache.store.remote import RemoteFolder

__all__ = ["StoreFiles"]


class StoreFiles:
    """Shards by array with their stamps, and the keys of all other files."""

    def __init__(self, folder: StoreFolder, specs: Iterable[ArraySpec]) -> None:
        """List the files of a store.

        Args:
            folder: the store.
            specs: its arrays. A file below an array that is not named as a shard is another file.
        """
        self.others: set[str] = set()
        """Keys of the files that are no shards."""
        by_place = {f"{DATA}/{spec.path}": spec for spec in specs}
        numbers = {spec.path: array("q") for spec in by_place.values()}
        stamps = {spec.path: array("Q") for spec in by_place.values()}
        for key, facts in _listed(folder):
            place, _, rest = key.rpartition("/c/")
            number = rest.partition("/")[0]
            spec = by_place.get(place)
            known = spec is not None and number.isdecimal() and len(number) < 18
            if spec is None or not known or key != shard_key(spec, int(number)):
                self.others.add(key)
                continue
            numbers[spec.path].append(int(number))
            stamps[spec.path].append(xxhash.xxh3_64_intdigest(facts.encode()))
        self._numbers: dict[str, NDArray[np.int64]] = {}
        self._stamps: dict[str, NDArray[np.uint64]] = {}
        for path in numbers:
            found = np.frombuffer(numbers[path], np.int64)
            order = np.argsort(found)
            self._numbers[path] = found[order]
            self._stamps[path] = np.frombuffer(stamps[path], np.uint64)[order]

    def shards(self, spec: ArraySpec) -> NDArray[np.int64]:
        """Numbers of the shards that an array had, in order."""
        return self._numbers[spec.path]

    def stamp(self, spec: ArraySpec, shard: int) -> int | None:
        """The stamp of a shard; None where there was none."""
        numbers = self._numbers[spec.path]
        at = int(np.searchsorted(numbers, shard))
        return int(self._stamps[spec.path][at]) if numbers[at : at + 1] == shard else None


def _listed(folder: StoreFolder) -> Iterator[tuple[str, str]]:
    """Every file with what is another text once it was written again."""
    if isinstance(folder, LocalFolder):
        # Not `keys`: Path.rglob remembers every path that it gave, half a gigabyte in the end.
        yield from _below(folder.root, "")
    elif isinstance(folder, RemoteFolder):
        # A thousand objects a request; one request for each shard would take hours.
        with folder._asking(""):
            for page in folder._obstore.list(folder._store):
                for entry in page:
                    yield str(entry["path"]), f"{entry['size']} {entry['e_tag']}"
    else:
        for key in folder.keys(""):
            yield key, str(folder.size(key))


def _below(folder: Path, prefix: str) -> Iterator[tuple[str, str]]:
    """The files below a folder; links are named and not followed, as by `LocalFolder.keys`."""
    try:
        listed = os.scandir(folder)
    except (PermissionError, FileNotFoundError):  # not ours (lost+found), or gone meanwhile
        return
    with listed as entries:
        for entry in entries:
            key = f"{prefix}{entry.name}"
            if entry.is_dir(follow_symlinks=False):
                yield from _below(folder / entry.name, f"{key}/")
            elif entry.is_symlink() or entry.is_file():
                try:
                    status = entry.stat()
                except OSError:  # gone meanwhile, or a link to nothing
                    yield key, ""
                else:
                    yield key, f"{status.st_size} {status.st_mtime_ns}"

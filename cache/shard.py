"""One shard file: a plain C-order array with a Zarr `sharding_indexed` index at its end.

    chunk 0 | chunk 1 | ... | chunk n-1 | n * (uint64 offset, uint64 bytes) | crc32c of the index

Everything little-endian. Chunks are uncompressed, in order and without gaps, so the first
`shard_rows * row_bytes` bytes are the rows of the shard, and a mapped shard is one tensor without a
copy. The footer has 16 n + 4 bytes. docs/format.md is normative.

A shard is written under a temporary name, made durable, then renamed: it exists whole or not at
all, and is never changed afterwards.
"""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import xxhash
from numpy.typing import NDArray

from bsc.cache.layout import ArraySpec, Grid
from bsc.errors import StoreError
from bsc.files import fsync_folder, make_durable_folder

__all__ = ["PARTIAL", "ChannelSums", "ShardRecord", "ShardWriter", "map_shard", "read_index"]

PARTIAL = ".partial"
_CRC_BYTES = 4


@dataclass
class ChannelSums:
    """Sums over rows for each channel, from which means and variances follow without a pass.

    Values that are not finite are counted and left out of the sums.
    """

    width: int
    sum: NDArray[np.float64] = field(init=False)
    sum_sq: NDArray[np.float64] = field(init=False)
    non_finite: int = 0

    def __post_init__(self) -> None:
        self.sum = np.zeros(self.width)
        self.sum_sq = np.zeros(self.width)

    def add(self, rows: NDArray[Any]) -> None:
        """Add bfloat16 rows, (n, width)."""
        with np.errstate(invalid="ignore"):  # NaN is counted below, not a surprise
            values = rows.astype(np.float64)
        finite = np.isfinite(values)
        if not finite.all():
            self.non_finite += int(finite.size - finite.sum())
            values[~finite] = 0.0
        self.sum += values.sum(axis=0)
        self.sum_sq += np.square(values).sum(axis=0)

    def merge(self, other: ChannelSums) -> None:
        """Add the sums of other rows."""
        self.sum += other.sum
        self.sum_sq += other.sum_sq
        self.non_finite += other.non_finite

    def to_json(self) -> dict[str, Any]:
        """The sums as they stand in the manifest and in the attributes of an array."""
        return {
            "channel_sum": self.sum.tolist(),
            "channel_sum_sq": self.sum_sq.tolist(),
            "non_finite": self.non_finite,
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> ChannelSums:
        """Read what `to_json` wrote."""
        sums = cls(len(value["channel_sum"]))
        sums.sum += value["channel_sum"]
        sums.sum_sq += value["channel_sum_sq"]
        sums.non_finite = int(value["non_finite"])
        return sums


@dataclass(frozen=True)
class ShardRecord:
    """What the manifest says of one shard of one array; one line of manifest.jsonl."""

    array: str
    """Path of the array inside data.zarr."""
    shard: int
    rows: int
    bytes: int
    """Size of the file, footer included."""
    xxh3_128: str
    """Of the whole file, as 32 hexadecimal digits."""
    chunk_xxh3_64: tuple[str, ...]
    """Of each chunk, as 16 hexadecimal digits."""
    window: int
    """Number of the scatter window that the rows come from."""
    sums: ChannelSums | None
    """Of activations; None for the token arrays."""

    def to_json(self) -> dict[str, Any]:
        """The line, as a value."""
        line = {
            "array": self.array,
            "shard": self.shard,
            "rows": self.rows,
            "bytes": self.bytes,
            "xxh3_128": self.xxh3_128,
            "chunk_xxh3_64": list(self.chunk_xxh3_64),
            "window": self.window,
        }
        return line | (self.sums.to_json() if self.sums else {})

    @classmethod
    def from_json(cls, line: dict[str, Any]) -> ShardRecord:
        """Read what `to_json` wrote.

        Raises:
            KeyError, TypeError, ValueError: the line is of another form.
        """
        return cls(
            array=str(line["array"]),
            shard=int(line["shard"]),
            rows=int(line["rows"]),
            bytes=int(line["bytes"]),
            xxh3_128=str(line["xxh3_128"]),
            chunk_xxh3_64=tuple(str(h) for h in line["chunk_xxh3_64"]),
            window=int(line["window"]),
            sums=ChannelSums.from_json(line) if "channel_sum" in line else None,
        )


def index_bytes(chunks: int, chunk_bytes: int) -> bytes:
    """The footer of a dense shard: offset and length of every chunk, then their crc32c."""
    index = np.empty((chunks, 2), dtype="<u8")
    index[:, 0] = np.arange(chunks, dtype="<u8") * np.uint64(chunk_bytes)
    index[:, 1] = chunk_bytes
    raw = index.tobytes()
    crc: int = google_crc32c.value(raw)
    return raw + crc.to_bytes(_CRC_BYTES, "little")


def read_index(path: Path, chunks: int) -> NDArray[np.uint64]:
    """Offset and length in bytes of every chunk, (chunks, 2).

    Raises:
        StoreError: the file is missing, too short, or its index is damaged.
    """
    size = 16 * chunks + _CRC_BYTES
    try:
        with path.open("rb") as file:
            if file.seek(0, os.SEEK_END) < size:
                raise StoreError(f"{path}: {file.tell()} bytes cannot hold the shard's index.")
            file.seek(-size, os.SEEK_END)
            raw = file.read(size)
    except FileNotFoundError:
        raise StoreError(f"{path}: this committed shard is missing.") from None
    except OSError as error:
        raise StoreError(f"{path}: cannot be read ({error.strerror}).") from None
    if google_crc32c.value(raw[:-_CRC_BYTES]) != int.from_bytes(raw[-_CRC_BYTES:], "little"):
        raise StoreError(f"{path}: the shard's index is damaged (its crc32c does not match).")
    return np.frombuffer(raw[:-_CRC_BYTES], dtype="<u8").reshape(chunks, 2)


def map_shard(path: Path, spec: ArraySpec, grid: Grid) -> NDArray[Any]:
    """The rows of a shard, mapped: (shard_rows, width) or (shard_rows,), no copy.

    Private and writable pages, so that torch takes the array without a warning; writing to it
    changes neither the file nor what others see.

    Raises:
        StoreError: the file is missing, of another size, or its index is not the dense one.
    """
    chunk_bytes = grid.chunk_rows * spec.row_bytes
    index = read_index(path, grid.chunks)
    expected = np.frombuffer(index_bytes(grid.chunks, chunk_bytes)[:-_CRC_BYTES], dtype="<u8")
    if not np.array_equal(index.ravel(), expected):
        raise StoreError(
            f"{path}: the chunks of this shard are not in order and without gaps, so it cannot be "
            f"mapped. Another program rewrote it; docs/format.md says what bsc reads."
        )
    raw = np.memmap(path, dtype=np.uint8, mode="c")
    if raw.size != grid.chunks * chunk_bytes + index.nbytes + _CRC_BYTES:
        raise StoreError(f"{path}: {raw.size:,} bytes are not the size of a shard of this store.")
    data = raw[: grid.chunks * chunk_bytes].view(spec.numpy_dtype)
    return data.reshape(spec.row_shape(grid.shard_rows))


class ShardWriter:
    """Appends rows to one shard through a buffer of one chunk, hashing and summing on the way."""

    def __init__(self, path: Path, spec: ArraySpec, grid: Grid) -> None:
        """Open `path` under its temporary name; nothing appears under `path` before `commit`.

        Raises:
            OSError: the disk is full or the folder cannot be written.
        """
        self.path, self.spec, self.grid = path, spec, grid
        self.rows = 0
        self.sums = ChannelSums(spec.width) if spec.width is not None else None
        self._chunk = np.empty(spec.row_shape(grid.chunk_rows), dtype=spec.numpy_dtype)
        self._file_hash = xxhash.xxh3_128()
        self._chunk_hashes: list[str] = []
        make_durable_folder(path.parent)
        self._partial = path.with_name(path.name + PARTIAL)
        self._fd = os.open(self._partial, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        try:
            if hasattr(os, "posix_fallocate"):  # not on macOS
                os.posix_fallocate(self._fd, 0, spec.shard_bytes(grid))
        except OSError as error:
            # Some file systems cannot reserve space; a full one must say so now.
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                self.abort()
                raise

    @property
    def free_rows(self) -> int:
        """Rows that still fit."""
        return self.grid.shard_rows - self.rows

    def append(self, rows: NDArray[Any]) -> None:
        """Add rows of the array's type, (n, width) or (n,), at most `free_rows`."""
        assert len(rows) <= self.free_rows and rows.dtype == self.spec.numpy_dtype
        done = 0
        while done < len(rows):
            at = self.rows % self.grid.chunk_rows
            n = min(len(rows) - done, self.grid.chunk_rows - at)
            self._chunk[at : at + n] = rows[done : done + n]
            self.rows += n
            done += n
            if self.rows % self.grid.chunk_rows == 0:
                self._flush()

    def _flush(self) -> None:
        raw = self._chunk.view(np.uint8).reshape(-1).data
        self._write(raw)
        self._chunk_hashes.append(xxhash.xxh3_64(raw).hexdigest())
        if self.sums is not None:
            self.sums.add(self._chunk)

    def _write(self, raw: memoryview | bytes) -> None:
        self._file_hash.update(raw)
        view = memoryview(raw)
        while view:
            view = view[os.write(self._fd, view) :]

    def rows_so_far(self) -> NDArray[Any]:
        """A copy of the rows appended until now, for moving them to another shard."""
        n = self.grid.chunk_rows
        whole = self.rows // n * n
        out = np.empty(self.spec.row_shape(self.rows), dtype=self.spec.numpy_dtype)
        for start in range(0, whole, n):  # one read returns 2 GiB at most
            raw = os.pread(self._fd, n * self.spec.row_bytes, start * self.spec.row_bytes)
            chunk = np.frombuffer(raw, self.spec.numpy_dtype)
            out[start : start + n] = chunk.reshape(self.spec.row_shape(n))
        out[whole:] = self._chunk[: self.rows - whole]
        return out

    def commit(self, shard: int, window: int) -> ShardRecord:
        """Write the index, make the file durable and give it its name.

        Raises:
            OSError: the disk is full or fails.
        """
        assert self.free_rows == 0
        self._write(index_bytes(self.grid.chunks, self.grid.chunk_rows * self.spec.row_bytes))
        size = os.lseek(self._fd, 0, os.SEEK_CUR)
        os.fsync(self._fd)
        os.close(self._fd)
        self._fd = -1
        self._partial.rename(self.path)
        fsync_folder(self.path.parent)
        return ShardRecord(
            array=self.spec.path,
            shard=shard,
            rows=self.rows,
            bytes=size,
            xxh3_128=self._file_hash.hexdigest(),
            chunk_xxh3_64=tuple(self._chunk_hashes),
            window=window,
            sums=self.sums,
        )

    def abort(self) -> None:
        """Drop what was written; does nothing after `commit`."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
            self._partial.unlink(missing_ok=True)

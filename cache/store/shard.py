"""One shard file: chunks of rows with a Zarr `sharding_indexed` index at the end.

    chunk 0 | chunk 1 | ... | chunk n-1 | n * (uint64 offset, uint64 bytes) | crc32c of the index

Everything little-endian. Chunks are in order and without gaps. Uncompressed, the first
`shard_rows * row_bytes` bytes are the rows of the shard, and a mapped shard is one tensor without a
copy. The footer has 16 n + 4 bytes. docs/format.md is normative.

A shard is staged under a temporary name, made durable, then published: it exists whole or not at
all, and is never changed afterwards.
"""

from __future__ import annotations

import mmap
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import google_crc32c
import numpy as np
import xxhash
from numpy.typing import NDArray

from bsc.cache.store.channel_sums import ChannelSums
from bsc.cache.store.codec import compress, decompress
from bsc.cache.store.folder import StoreFolder
from bsc.cache.store.layout import ArraySpec, Grid, shard_key
from bsc.errors import StoreError

__all__ = [
    "MappedRows",
    "ShardRecord",
    "ShardWriter",
    "decode_shard",
    "map_shard",
    "piece_bytes",
    "read_index",
]

_CRC_BYTES = 4
_WRITE_BYTES = 1 << 18
"""Rows are written in pieces of about this size, if segments that come are smaller."""
"""Rows that are summed in float32 before they enter the float64 sums: exact to about 1e-7."""


@dataclass(frozen=True)
class ShardRecord:
    """What the manifest says of one shard of one array; one line of it."""

    array: str
    """Path of the array inside data.zarr."""
    shard: int
    rows: int
    bytes: int
    """Size of the file, footer included."""
    xxh3_128: str
    """Hash of the whole file, as 32 hexadecimal digits."""
    chunk_xxh3_64: tuple[str, ...]
    """Hash of each chunk, as 16 hexadecimal digits."""
    window: int
    """Number of the scatter window that the rows come from."""
    sums: ChannelSums | None
    """Sums over the channels of activations; None for the token arrays."""

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


def index_bytes(lengths: list[int]) -> bytes:
    """The footer of a shard: offset and length of every chunk, then their crc32c."""
    index = np.empty((len(lengths), 2), dtype="<u8")
    index[:, 1] = lengths
    index[:, 0] = np.concatenate([[0], np.cumsum(lengths)[:-1]])
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


class MappedRows(NamedTuple):
    """The rows of an uncompressed shard with the mapping that they lie in."""

    rows: NDArray[Any]
    mapping: mmap.mmap


def map_shard(path: Path, spec: ArraySpec, grid: Grid) -> MappedRows:
    """The rows of an uncompressed shard, mapped: (shard_rows, width) or (shard_rows,), no copy.

    Private and writable pages, so that torch takes the array without a warning; writing to it
    changes neither the file nor what others see.

    Raises:
        StoreError: the file is missing, of another size, or its index is not the dense one.
    """
    index = read_index(path, grid.chunks)
    expected = index_bytes([grid.chunk_rows * spec.row_bytes] * grid.chunks)
    if index.tobytes() != expected[:-_CRC_BYTES]:
        raise StoreError(
            f"{path}: the chunks of this shard are not in order and without gaps, so it cannot be "
            f"mapped. Another program rewrote it; docs/format.md says what bsc reads."
        )
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size != spec.shard_bytes(grid):
            raise StoreError(f"{path}: {size:,} bytes are not the size of a shard of this store.")
        mapping = mmap.mmap(
            file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE
        )
    data = np.frombuffer(mapping, np.uint8, grid.shard_rows * spec.row_bytes)
    return MappedRows(data.view(spec.numpy_dtype).reshape(spec.row_shape(grid.shard_rows)), mapping)


def decode_shard(path: Path, spec: ArraySpec, grid: Grid) -> NDArray[Any]:
    """The rows of a compressed shard in fresh memory.

    Raises:
        StoreError: the file is missing or damaged.
    """
    index = read_index(path, grid.chunks)
    raw = memoryview(path.read_bytes())
    end = len(raw) - index.nbytes - _CRC_BYTES
    rows = np.empty(spec.row_shape(grid.shard_rows), spec.numpy_dtype)
    for chunk, (offset, length) in enumerate(index.tolist()):
        if offset + length > end:
            raise StoreError(f"{path}: chunk {chunk} does not lie in the file.")
        start = chunk * grid.chunk_rows
        try:
            decompress(raw[offset : offset + length], rows[start : start + grid.chunk_rows])
        except StoreError as error:
            raise StoreError(f"{path}: chunk {chunk}: {error}") from None
    return rows


class ShardWriter:
    """Appends rows to one shard, hashing on the way."""

    def __init__(self, folder: StoreFolder, spec: ArraySpec, grid: Grid, shard: int) -> None:
        """Start a staged file; nothing appears under the shard's name before `commit`.

        Raises:
            OSError: the disk is full or the folder cannot be written.
        """
        self.folder, self.spec, self.grid, self.shard = folder, spec, grid, shard
        self.key = shard_key(spec, shard)
        self.rows = 0
        self._piece_rows = _piece_rows(spec, grid)
        self._piece: NDArray[Any] | None = None
        self._file_hash = xxhash.xxh3_128()
        self._chunk_hash = xxhash.xxh3_64()
        self._chunk_hashes: list[str] = []
        self._chunk_bytes: list[int] = []
        self._staging = folder.staging(self.key)
        # What a killed capture left under this name is written over.
        self._fd = os.open(self._staging, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)

    @property
    def free_rows(self) -> int:
        """Rows that still fit."""
        return self.grid.shard_rows - self.rows

    def append(self, rows: NDArray[Any]) -> None:
        """Add rows of the array's type, (n, width) or (n,), at most `free_rows`; contiguous."""
        assert len(rows) <= self.free_rows and rows.dtype == self.spec.numpy_dtype
        size = self._piece_rows
        done = 0
        while done < len(rows):
            at = self.rows % size
            left = len(rows) - done
            if at == 0 and left >= size and not self.spec.lz4:
                # Whole pieces go out of the caller's memory, to the end of the chunk at most.
                n = min(left, self.grid.chunk_rows - self.rows % self.grid.chunk_rows)
                n = n // size * size
                self.rows += n
                self._write_rows(rows[done : done + n])
            else:
                if self._piece is None:
                    self._piece = np.empty(self.spec.row_shape(size), self.spec.numpy_dtype)
                n = min(left, size - at)
                self._piece[at : at + n] = rows[done : done + n]
                self.rows += n
                if self.rows % size == 0:
                    self._write_rows(self._piece)
            done += n

    def _write_rows(self, rows: NDArray[Any]) -> None:
        raw = memoryview(compress(rows) if self.spec.lz4 else rows.view(np.uint8).reshape(-1).data)
        self._write(raw)
        self._chunk_hash.update(raw)
        if self.rows % self.grid.chunk_rows == 0:
            self._chunk_hashes.append(self._chunk_hash.hexdigest())
            self._chunk_hash.reset()
            self._chunk_bytes.append(
                len(raw) if self.spec.lz4 else self.grid.chunk_rows * self.spec.row_bytes
            )

    def _write(self, raw: memoryview | bytes) -> None:
        self._file_hash.update(raw)
        view = memoryview(raw)
        while view:
            view = view[os.write(self._fd, view) :]

    def rows_so_far(self) -> NDArray[Any]:
        """A copy of the rows appended until now, for moving them to another shard."""
        out = np.empty(self.spec.row_shape(self.rows), dtype=self.spec.numpy_dtype)
        whole = self.rows // self._piece_rows * self._piece_rows
        if self.spec.lz4:
            offset = 0
            for i, length in enumerate(self._chunk_bytes):
                start = i * self.grid.chunk_rows
                frame = memoryview(os.pread(self._fd, length, offset))
                decompress(frame, out[start : start + self.grid.chunk_rows])
                offset += length
        else:
            view = out[:whole].view(np.uint8).reshape(-1).data
            at = 0
            while at < len(view):  # one read returns 2 GiB at most
                at += os.preadv(self._fd, [view[at:]], at)
        if whole < self.rows:
            assert self._piece is not None
            out[whole:] = self._piece[: self.rows - whole]
        return out

    def commit(self, window: int, sums: ChannelSums | None) -> ShardRecord:
        """Write the index, make the file durable and give it its name.

        Raises:
            OSError: the disk is full or fails.
        """
        assert self.free_rows == 0
        self._write(index_bytes(self._chunk_bytes))
        size = os.lseek(self._fd, 0, os.SEEK_CUR)
        os.fsync(self._fd)
        os.close(self._fd)
        self._fd = -1
        self._piece = None
        self.folder.publish(self.key)
        return ShardRecord(
            array=self.spec.path,
            shard=self.shard,
            rows=self.rows,
            bytes=size,
            xxh3_128=self._file_hash.hexdigest(),
            chunk_xxh3_64=tuple(self._chunk_hashes),
            window=window,
            sums=sums,
        )

    def abort(self) -> None:
        """Drop what was written; does nothing after `commit`."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
            self._staging.unlink(missing_ok=True)


def piece_bytes(spec: ArraySpec, grid: Grid) -> int:
    """Memory that an open shard of an array needs."""
    return _piece_rows(spec, grid) * spec.row_bytes


def _piece_rows(spec: ArraySpec, grid: Grid) -> int:
    """Rows that are buffered before they are written: a chunk, or a fair part of one."""
    if spec.lz4 or grid.chunk_rows * spec.row_bytes <= _WRITE_BYTES:
        return grid.chunk_rows
    fair = max(1, _WRITE_BYTES // spec.row_bytes)
    divisor = max(n for n in range(1, fair + 1) if grid.chunk_rows % n == 0)
    return divisor if 4 * divisor >= fair else grid.chunk_rows

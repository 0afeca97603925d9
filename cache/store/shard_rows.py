"""The rows of one shard, for reading some or all of them, whatever the codec."""

from __future__ import annotations

import ctypes
import mmap
import os
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from bsc.cache.store.codec import dequantise

__all__ = ["MappedTensor", "QuantisedRows", "ShardRows"]

_POPULATE_READ = 22
"""MADV_POPULATE_READ of Linux 5.14, which Python does not name."""
_READ = 8 << 20
_LIBC = ctypes.CDLL(None)
_LIBC.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


class ShardRows(Protocol):
    """Rows of one array of one shard."""

    def part(self, start: int, stop: int) -> torch.Tensor:
        """Rows in order: bfloat16 (stop - start, width)."""

    def take(self, rows: torch.Tensor, out: torch.Tensor) -> None:
        """Chosen rows, (n,) int32 or int64, into `out`, bfloat16 (n, width)."""

    def load(self) -> None:
        """Read everything from the disk now, for a thread that works ahead."""


class MappedTensor(NamedTuple):
    """Rows in memory or in a mapped file."""

    rows: NDArray[Any]
    mapping: mmap.mmap | None
    """None where the rows were decoded into memory."""
    path: Path

    def tensor(self) -> torch.Tensor:
        """The rows as torch sees them: bfloat16, int8 or float32."""
        if self.rows.dtype.itemsize == 2:
            return torch.from_numpy(self.rows.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(self.rows)

    def part(self, start: int, stop: int) -> torch.Tensor:
        """Rows in order: bfloat16 (stop - start, width), no copy."""
        return self.tensor()[start:stop]

    def take(self, rows: torch.Tensor, out: torch.Tensor) -> None:
        """Chosen rows, (n,) int32 or int64, into `out`."""
        torch.index_select(self.tensor(), 0, rows, out=out)

    def load(self) -> None:
        """Read everything from the disk now."""
        if self.mapping is None:
            return
        # Not mapping.madvise: it holds the interpreter's lock until the disk has answered.
        address = self.rows.ctypes.data
        if _LIBC.madvise(ctypes.c_void_p(address), len(self.mapping), _POPULATE_READ) != 0:
            # An older kernel: through the page cache then.
            with self.path.open("rb", buffering=0) as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
                scratch = bytearray(_READ)
                while file.readinto(scratch):
                    pass


class QuantisedRows(NamedTuple):
    """int8 rows with their scales."""

    values: MappedTensor
    row_scale: MappedTensor
    channel_scale: torch.Tensor
    """(width,) float32."""

    def part(self, start: int, stop: int) -> torch.Tensor:
        """Rows in order: bfloat16 (stop - start, width)."""
        values, scale = self.values.tensor(), self.row_scale.tensor()
        return dequantise(values[start:stop], scale[start:stop], self.channel_scale)

    def take(self, rows: torch.Tensor, out: torch.Tensor) -> None:
        """Chosen rows, (n,) int32 or int64, into `out`, bfloat16 (n, width)."""
        values = self.values.tensor().index_select(0, rows)
        scale = self.row_scale.tensor().index_select(0, rows)
        out.copy_(dequantise(values, scale, self.channel_scale))

    def load(self) -> None:
        """Read everything from the disk now."""
        self.values.load()
        self.row_scale.load()

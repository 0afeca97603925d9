"""How values become the bytes of a chunk, and back: raw, lz4 and int8 (docs/format.md, Codecs).

* raw: the rows as they are.
* lz4: each chunk compressed by Blosc with bit shuffle; exact.
* int8: x is stored as q * s_row * c_channel, q a whole number from -127 to 127, c_channel about the
  root mean square of the channel, s_row such that the largest |q| of a row is 127. Scaling the
  channels first is what keeps quiet ones: without it one loud channel takes all the levels.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import torch
from numcodecs import Blosc
from numpy.typing import NDArray

from bsc.errors import StoreError

__all__ = ["QMAX", "compress", "decompress", "dequantise", "quantise"]

QMAX = 127
_HEADER_BYTES = 16
"""Bytes of the header of a Blosc frame; bytes 4 to 7 are the size of what it holds."""
_BLOSC = Blosc(cname="lz4", clevel=5, shuffle=Blosc.BITSHUFFLE, blocksize=0)


def compress(chunk: NDArray[Any]) -> bytes:
    """One chunk as a Blosc frame: lz4, bit shuffle, type size of the array."""
    words = chunk.view(f"u{chunk.dtype.itemsize}").reshape(-1)
    frame: bytes = _BLOSC.encode(words)
    return frame


def decompress(frame: memoryview, out: NDArray[Any]) -> None:
    """Decode a Blosc frame into `out`, which is contiguous and has the right size.

    Raises:
        StoreError: the frame is damaged or of another size.
    """
    size = int.from_bytes(frame[4:8], "little") if len(frame) >= _HEADER_BYTES else -1
    if size != out.nbytes:
        raise StoreError(f"a compressed chunk is damaged (it holds {size} bytes, not {out.nbytes})")
    try:
        _BLOSC.decode(frame, out.view(np.uint8).reshape(-1))
    except (RuntimeError, ValueError, BufferError) as error:
        raise StoreError(f"a compressed chunk is damaged ({error})") from None


def quantise(
    rows: NDArray[Any], channel_scale: NDArray[np.float32]
) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Rows as int8 with a scale each.

    Args:
        rows: (n, d) bfloat16.
        channel_scale: (d,) positive.

    Returns:
        (n, d) int8 from -127 to 127, and (n,) float32. A row with a value that is not finite gets
        the scale NaN, so that it reads as NaN.
    """
    with np.errstate(invalid="ignore"):
        scaled = rows.astype(np.float32) / channel_scale
        scale = np.abs(scaled).max(axis=1) / np.float32(QMAX)
        scale[~np.isfinite(scale)] = np.nan
        divisor = np.where(np.isnan(scale) | (scale == 0), np.float32(np.inf), scale)
        q = np.nan_to_num(np.rint(scaled / divisor[:, None]), nan=0.0)
    return np.clip(q, -QMAX, QMAX).astype(np.int8), scale.astype(np.float32)


def dequantise(
    q: torch.Tensor, row_scale: torch.Tensor, channel_scale: torch.Tensor
) -> torch.Tensor:
    """What int8 rows stand for: (n, d) bfloat16 from (n, d) int8, (n,) and (d,) float32."""
    return (q.float().mul_(row_scale.unsqueeze(1)).mul_(channel_scale)).bfloat16()


def dequantised(
    q: NDArray[np.int8], row_scale: NDArray[np.float32], channel_scale: NDArray[np.float32]
) -> NDArray[Any]:
    """The same in numpy, for the writer's own account of the error."""
    values = q.astype(np.float32) * row_scale[:, None] * channel_scale
    return values.astype(ml_dtypes.bfloat16)

"""Sums of each channel of an activation array, kept with each shard and for the whole array."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["ChannelSums"]

_SUM_ROWS = 256


@dataclass
class ChannelSums:
    """Sums over rows for each channel, from which means and variances follow without a pass.

    Rows with values that are not finite are counted and left out of the sums.
    """

    width: int
    sum: NDArray[np.float64] = field(init=False)
    sum_sq: NDArray[np.float64] = field(init=False)
    non_finite: int = 0
    """Values that are not finite."""
    non_finite_rows: int = 0
    """Rows that hold such a value."""
    sum_sq_error: NDArray[np.float64] | None = None
    """For lossy codecs, the squared difference of stored and captured values."""

    def __post_init__(self) -> None:
        self.sum = np.zeros(self.width)
        self.sum_sq = np.zeros(self.width)

    def add(self, rows: NDArray[Any], stored: NDArray[Any] | None = None) -> None:
        """Add bfloat16 rows, (n, width), and what is stored of them where that differs."""
        for start in range(0, len(rows), _SUM_ROWS):
            block = rows[start : start + _SUM_ROWS]
            # bfloat16 is the upper half of a float32.
            values = (block.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
            with np.errstate(invalid="ignore", over="ignore"):
                squares = np.einsum("ij,ij->j", values, values)
            good: NDArray[np.bool_] | slice = slice(None)
            if not np.isfinite(squares).all():
                finite = np.isfinite(values)
                good = np.asarray(finite.all(axis=1))
                self.non_finite += int(finite.size - finite.sum())
                self.non_finite_rows += int(good.size - good.sum())
                # Finite rows can still be too large for the squares of float32.
                values = values[good].astype(np.float64)
                squares = np.einsum("ij,ij->j", values, values)
            self.sum += values.sum(axis=0)
            self.sum_sq += squares
            if stored is not None:
                part = stored[start : start + _SUM_ROWS][good].astype(np.float32)
                if self.sum_sq_error is None:
                    self.sum_sq_error = np.zeros(self.width)
                self.sum_sq_error += np.square(part - values).sum(axis=0, dtype=np.float64)

    def merge(self, other: ChannelSums) -> None:
        """Add the sums of other rows."""
        self.sum += other.sum
        self.sum_sq += other.sum_sq
        self.non_finite += other.non_finite
        self.non_finite_rows += other.non_finite_rows
        if other.sum_sq_error is not None:
            mine = np.zeros(self.width) if self.sum_sq_error is None else self.sum_sq_error
            self.sum_sq_error = mine + other.sum_sq_error

    def to_json(self) -> dict[str, Any]:
        """The sums as they stand in the manifest and in the attributes of an array."""
        value: dict[str, Any] = {
            "channel_sum": self.sum.tolist(),
            "channel_sum_sq": self.sum_sq.tolist(),
            "non_finite": self.non_finite,
            "non_finite_rows": self.non_finite_rows,
        }
        if self.sum_sq_error is not None:
            value["channel_sum_sq_error"] = self.sum_sq_error.tolist()
        return value

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> ChannelSums:
        """Read what `to_json` wrote.

        Raises:
            KeyError, TypeError, ValueError: the value is of another form.
        """
        sums = cls(len(value["channel_sum"]))
        sums.sum += value["channel_sum"]
        sums.sum_sq += value["channel_sum_sq"]
        sums.non_finite = int(value["non_finite"])
        sums.non_finite_rows = int(value["non_finite_rows"])
        if "channel_sum_sq_error" in value:
            sums.sum_sq_error = np.zeros(sums.width) + value["channel_sum_sq_error"]
        return sums

"""The data type `bfloat16` for zarr-python 3.1 and later, as zarr-extensions registers it.

tensorstore knows the type by itself. zarr-python needs this class: importing the module registers
it, and zarr 3.4.1 and later find it by themselves through the entry point `zarr.data_type`.

Source: https://github.com/zarr-developers/zarr-extensions/tree/main/data-types/bfloat16
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any, ClassVar, TypeGuard

import ml_dtypes
import numpy as np

# Not public in zarr 3.1, there in every release from 3.1 to 3.4.
from zarr.core.dtype.common import HasEndianness, HasItemSize
from zarr.dtype import DataTypeValidationError, ZDType, data_type_registry

__all__ = ["BFloat16"]

_NUMPY_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_SPECIAL = {"NaN": float("nan"), "Infinity": float("inf"), "-Infinity": -float("inf")}


@dataclass(frozen=True, kw_only=True)
class BFloat16(ZDType[Any, Any], HasEndianness, HasItemSize):
    """Bit-exact with tensorstore's `bfloat16`, both ways.

    `HasEndianness` matters: without it zarr leaves `endian` out of the `bytes` codec, and
    tensorstore refuses the array.
    """

    dtype_cls = type(_NUMPY_BFLOAT16)
    _zarr_v3_name: ClassVar[str] = "bfloat16"
    _zarr_v2_name: ClassVar[str] = "bfloat16"

    @property
    def item_size(self) -> int:
        """Bytes per value."""
        return 2

    @classmethod
    def _check_native_dtype(cls, dtype: Any) -> TypeGuard[Any]:
        return getattr(dtype, "type", None) is ml_dtypes.bfloat16

    @classmethod
    def from_native_dtype(cls, dtype: Any) -> BFloat16:
        """The zarr type of numpy's bfloat16.

        Raises:
            DataTypeValidationError: `dtype` is another type.
        """
        if cls._check_native_dtype(dtype):
            return cls()
        raise DataTypeValidationError(f"not bfloat16: {dtype}")

    def to_native_dtype(self) -> Any:
        """numpy's bfloat16, in the order of bytes of every machine that torch runs on."""
        if self.endianness == "big" or sys.byteorder == "big":
            raise NotImplementedError("bfloat16 is supported in little-endian order alone")
        return _NUMPY_BFLOAT16

    @classmethod
    def _from_json_v2(cls, data: Any) -> BFloat16:
        if isinstance(data, dict) and data.get("name") == cls._zarr_v2_name:
            return cls()
        raise DataTypeValidationError(f"not bfloat16: {data!r}")

    @classmethod
    def _from_json_v3(cls, data: Any) -> BFloat16:
        if isinstance(data, dict) and not data.get("configuration"):
            data = data.get("name")
        if data == "bfloat16":
            return cls()
        raise DataTypeValidationError(f"not bfloat16: {data!r}")

    def to_json(self, zarr_format: Any) -> Any:
        """The name of the type in metadata."""
        return "bfloat16" if zarr_format == 3 else {"name": "bfloat16", "object_codec_id": None}

    def _check_scalar(self, data: Any) -> bool:
        return isinstance(data, (int, float, np.floating, np.integer, ml_dtypes.bfloat16))

    def cast_scalar(self, data: Any) -> Any:
        """`data` rounded to bfloat16."""
        if self._check_scalar(data):
            return ml_dtypes.bfloat16(data)
        raise TypeError(f"cannot cast {data!r} to bfloat16")

    def default_scalar(self) -> Any:
        """Zero."""
        return ml_dtypes.bfloat16(0)

    def to_json_scalar(self, data: Any, *, zarr_format: Any) -> Any:
        """A fill value as JSON has it: a number, or the name of a special value."""
        value = float(self.cast_scalar(data))
        if np.isnan(value):
            return "NaN"
        if np.isinf(value):
            return "Infinity" if value > 0 else "-Infinity"
        return value

    def from_json_scalar(self, data: Any, *, zarr_format: Any) -> Any:
        """A fill value from JSON: a number, a special name, or the bits as ``"0x7fc0"``."""
        if isinstance(data, str):
            if data.startswith("0x"):
                return np.frombuffer(int(data, 16).to_bytes(2, "little"), _NUMPY_BFLOAT16)[0]
            return ml_dtypes.bfloat16(_SPECIAL[data])
        return self.cast_scalar(data)


data_type_registry.register("bfloat16", BFloat16)

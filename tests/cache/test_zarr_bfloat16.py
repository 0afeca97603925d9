from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import tensorstore as ts
import zarr

import bsc.cache.store.zarr_bfloat16  # noqa: F401  (registers the type)

ALL_BITS = np.arange(65_536, dtype=np.uint16).view(ml_dtypes.bfloat16)


def tensorstore_open(path: Path) -> ts.TensorStore:
    return ts.open({"driver": "zarr3", "kvstore": f"file://{path}/"}).result()


# zarr compares every chunk with its fill value, NaN included.
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_every_bit_pattern_goes_from_zarr_to_tensorstore(tmp_path: Path) -> None:
    a = zarr.create_array(
        tmp_path / "a", shape=(65_536,), dtype=ml_dtypes.bfloat16, chunks=(4096,),
        compressors=None, fill_value=float("nan"),
    )  # fmt: skip
    a[:] = ALL_BITS
    read = tensorstore_open(tmp_path / "a").read().result()
    assert np.array_equal(read.view(np.uint16), ALL_BITS.view(np.uint16))


def test_every_bit_pattern_goes_from_tensorstore_to_zarr(tmp_path: Path) -> None:
    spec = {
        "driver": "zarr3", "kvstore": f"file://{tmp_path}/a/",
        "metadata": {"data_type": "bfloat16", "shape": [65_536]}, "create": True,
    }  # fmt: skip
    ts.open(spec).result().write(ALL_BITS).result()
    read = zarr.open_array(tmp_path / "a", mode="r")[:]
    assert np.array_equal(np.asarray(read).view(np.uint16), ALL_BITS.view(np.uint16))


def test_importing_bsc_is_enough_for_zarr_in_either_order() -> None:
    for first, second in (("bsc", "zarr"), ("zarr", "bsc")):
        code = (
            f"import {first}, {second}, ml_dtypes\n"
            "from zarr.dtype import parse_dtype\n"
            "print(parse_dtype(ml_dtypes.bfloat16, zarr_format=3).to_json(zarr_format=3))"
        )
        out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert out.stdout.strip() == "bfloat16", out.stderr

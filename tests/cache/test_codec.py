"""What codecs keep of rows, and what they cost."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch

from bsc.cache.store.codec import compress, decompress, dequantised, quantise
from bsc.cache.store.kinds import CODECS
from bsc.cache.store.store import ActivationStore
from bsc.errors import StoreError
from tests.cache.synthetic import GRID, make_store


def test_int8_is_as_good_as_it_says_and_lz4_is_smaller(tmp_path: Path) -> None:
    torch.manual_seed(0)
    loud = torch.tensor([1.0, 1.0, 1.0, 100.0])

    def real(b: dict[str, torch.Tensor]) -> None:
        n = len(b["tokens/token_id"])
        b["layers.0.mlp/input"] = (torch.randn(n, 4) * loud).bfloat16()

    sizes = {}
    for codec in CODECS:
        torch.manual_seed(0)
        make_store(tmp_path / codec, 960, GRID, window=4, codec=codec, edit=real)
        folder = tmp_path / codec / "data.zarr/layers.0.mlp"
        sizes[codec] = sum(p.stat().st_size for p in folder.rglob("*") if "/c/" in str(p))
    exact = ActivationStore(tmp_path / "raw").train.tensor("layers.0.mlp/input", 3).float()
    stored = ActivationStore(tmp_path / "int8").train.tensor("layers.0.mlp/input", 3).float()
    error = ((stored - exact).square().sum(0) / exact.square().sum(0)).tolist()
    said = json.loads((tmp_path / "int8/provenance.json").read_text())["completed"]
    said = said["fvu_of_stored_rows"]["layers.0.mlp/input"]
    # The scales of this test are 1, so the loud channel takes the levels and the median shows it.
    assert 0 < said["total"] < 1e-4 < 1e-2 < said["median_channel"] < 1
    assert said["median_channel"] == pytest.approx(np.median(error), rel=0.3)
    lossless = ActivationStore(tmp_path / "lz4").train.tensor("layers.0.mlp/input", 3).float()
    assert torch.equal(lossless, exact)


def test_a_short_compressed_chunk_is_refused_and_not_read_as_whatever_was_there() -> None:
    whole, short = np.arange(64, dtype=np.uint16), np.arange(32, dtype=np.uint16)
    out = np.empty(64, np.uint16)
    decompress(memoryview(compress(whole)), out)
    assert np.array_equal(out, whole)
    with pytest.raises(StoreError, match="holds 64 bytes, not 128"):
        decompress(memoryview(compress(short)), out)
    with pytest.raises(StoreError, match="damaged"):
        decompress(memoryview(b"abc"), out)


def test_int8_keeps_zero_rows_and_marks_rows_that_are_not_finite() -> None:
    rows = np.array([[0, 0], [3, -1], [np.nan, 1], [1e38, 1]], dtype=ml_dtypes.bfloat16)
    q, scale = quantise(rows, np.ones(2, np.float32))
    back = dequantised(q, scale, np.ones(2, np.float32)).astype(np.float32)
    assert back[0].tolist() == [0, 0] and np.isnan(back[2]).all()
    assert np.allclose(back[1], [3, -1], rtol=0.02) and abs(q).max() == 127
    assert np.isclose(back[3, 0], 1e38, rtol=0.01)

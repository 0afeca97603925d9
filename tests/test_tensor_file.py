"""Files of tensors: whole or not at all, for all who may read the folder."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

import bsc.tensor_file
from bsc.errors import UserError
from bsc.tensor_file import write_tensors


def test_tensors_come_back_and_others_may_read_them(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    whole = torch.arange(12.0).reshape(3, 4)
    write_tensors(path, {"columns": whole[:, 1:3], "whole": whole.bfloat16()})
    write_tensors(path, {"columns": whole[:, ::2].requires_grad_()})
    assert load_file(path)["columns"].equal(whole[:, ::2])
    (tmp_path / "plain").touch()
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert sorted(os.listdir(tmp_path)) == ["a.safetensors", "plain"]


def test_a_file_that_cannot_be_written_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.safetensors"
    write_tensors(path, {"a": torch.ones(2)})
    before = path.read_bytes()

    def full(tensors: object, place: Path) -> None:
        place.write_bytes(b"half")
        raise SafetensorError("No space left on device (os error 28)")

    monkeypatch.setattr(bsc.tensor_file, "save_file", full)
    with pytest.raises(UserError, match=r"a\.safetensors: cannot be written .*No space.*Make"):
        write_tensors(path, {"a": torch.zeros(2)}, "Make room.")
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["a.safetensors"]

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pytest

import bsc.eval.passes.codes
from bsc.errors import StoreError
from bsc.eval.passes.pieces import Pieces
from tests.eval.planted import latent_code, saved_codes


@pytest.mark.parametrize("in_memory", [1 << 20, 0])
def test_a_code_sorted_by_latent_is_the_plain_transpose(
    tmp_path: Path, in_memory: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bsc.eval.passes.codes, "SORTED_IN_MEMORY", in_memory)
    rng = np.random.default_rng(0)
    dense = (rng.normal(size=(300, 17)) * (rng.random((300, 17)) < 0.2)).astype(np.float32)
    dense[:, 3] = 0  # a latent that never fires
    found = saved_codes(tmp_path / "codes", dense, pieces=4).by_latent()
    plain = latent_code(dense)
    assert np.array_equal(found.offsets, plain.offsets)
    assert np.array_equal(found.row, plain.row) and np.array_equal(found.margin, plain.margin)
    assert len(found.of(3)[0]) == 0
    assert np.array_equal(found.of(5)[0], np.flatnonzero(dense[:, 5]))
    # Nothing is left beside the code.
    assert {p.suffix for p in (tmp_path / "codes").iterdir()} == {".json", ".safetensors"}


def test_a_full_disk_is_said_where_firings_are_sorted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A map of a file that there is no room for would end the process by a signal."""
    monkeypatch.setattr(bsc.eval.passes.codes, "SORTED_IN_MEMORY", 0)

    def full(descriptor: int, offset: int, size: int) -> None:
        raise OSError(errno.ENOSPC, f"No space left for {size} bytes")

    monkeypatch.setattr(os, "posix_fallocate", full)
    codes = saved_codes(tmp_path / "codes", np.ones((30, 4), np.float32), pieces=2)
    with pytest.raises(StoreError, match=r"no room to sort 120 firings .*480 bytes.*--rows"):
        codes.by_latent()


def test_blocks_cover_every_latent_once() -> None:
    dense = np.ones((10, 9), np.float32)
    dense[:, 4:7] = 0
    blocks = list(latent_code(dense).ranges(firings=25))
    assert [i for a, b in blocks for i in range(a, b)] == list(range(9)) and len(blocks) > 2
    assert [i for a, b in latent_code(dense).ranges(1) for i in range(a, b)] == list(range(9))


def test_pieces_of_something_else_are_thrown_away(tmp_path: Path) -> None:
    one = Pieces.open(tmp_path / "p", {"coder": "a"})
    one.write(0, {"x": np.arange(3)})
    assert Pieces.open(tmp_path / "p", {"coder": "a"}).done(0)
    assert not Pieces.open(tmp_path / "p", {"coder": "b"}).done(0)


def test_a_damaged_piece_says_what_to_do(tmp_path: Path) -> None:
    pieces = Pieces.open(tmp_path / "p", 1)
    pieces.write(0, {"x": np.arange(3)})
    path = tmp_path / "p" / "00000.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(StoreError, match=r"Remove .*p and give the command again"):
        pieces.read(0)

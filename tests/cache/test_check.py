"""A store that was damaged on disk is not trained on or evaluated as if nothing were."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash

from bsc.cache.store.folder import open_folder
from bsc.cache.store.kinds import Codec
from bsc.cache.store.layout import Grid
from bsc.cache.store.loader import Loader
from bsc.cache.store.manifest import read_shard_hashes, read_window
from bsc.cache.store.store import ActivationStore
from bsc.cli import main
from bsc.errors import StoreError
from bsc.train.run import Run
from tests.cache.synthetic import make_store

GRID = Grid(96, 24, 10)


def damage(path: Path, at: int = 100) -> None:
    """One byte of the rows becomes another; size and footer stay."""
    raw = bytearray(path.read_bytes())
    raw[at] ^= 8
    path.write_bytes(raw)


@pytest.mark.parametrize("codec", ["raw", "lz4", "int8"])
@pytest.mark.parametrize(
    "array", ["layers.0.mlp/input", "layers.0.mlp/output", "tokens/doc_id", "tokens/ngram"]
)
def test_a_changed_byte_is_found_by_whoever_reads_it_first(
    tmp_path: Path, codec: Codec, array: str
) -> None:
    make_store(tmp_path / "acts", 960, GRID, window=4, codec=codec)
    (path,) = [p for p in (tmp_path / f"acts/data.zarr/{array}/c/7").rglob("*") if p.is_file()] or [
        tmp_path / f"acts/data.zarr/{array}/c/7"
    ]
    damage(path, 30)
    split = ActivationStore(tmp_path / "acts").train
    read = split.shard if array.startswith("tokens/") else split.shard_rows
    read(array, 6)
    with pytest.raises(StoreError, match=rf"{array}/c/7.*: changed since it was written"):
        read(array, 7)
    # Not asked: as it is.
    unchecked = ActivationStore(tmp_path / "acts", check=False).train
    if codec != "lz4" or array.startswith("tokens/"):
        (unchecked.shard if array.startswith("tokens/") else unchecked.shard_rows)(array, 7)


def test_the_loader_meets_it_too_and_checks_a_shard_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_store(tmp_path / "acts", 960, GRID, window=4)
    hashed: list[int] = []
    plain = xxhash.xxh3_128_hexdigest

    def counted(raw: Any) -> str:
        hashed.append(len(raw))
        return plain(raw)

    monkeypatch.setattr(xxhash, "xxh3_128_hexdigest", counted)

    def read(epochs: int) -> int:
        split = ActivationStore(tmp_path / "acts").train
        loader = Loader(split, ("layers.0.mlp/input",), batch_rows=96, seed=0)
        batches = loader.batches()
        return sum(len(next(batches)[0]) for _ in range(10 * epochs))

    assert read(3) == 2_880
    shards = [n for n in hashed if n == 96 * 8 + 16 * 4 + 4]
    assert len(shards) == 10
    damage(tmp_path / "acts/data.zarr/layers.0.mlp/input/c/3/0")
    with pytest.raises(StoreError, match=r"layers.0.mlp/input/c/3/0: changed"):
        read(1)


def test_several_writers_and_a_text_that_ended_early(tmp_path: Path) -> None:
    """The line of a shard is in the manifest of its writer and window, whatever was planned."""
    for rank, rows in ((0, 480), (1, 250)):
        make_store(tmp_path / "acts", rows, GRID, window=2, rank=rank, writers=2, first=rank * 500)
    split = ActivationStore(tmp_path / "acts").train
    assert split.shards < 10
    for shard in range(split.shards):
        split.tensor("layers.0.mlp/input", shard)


def test_a_shard_that_the_manifest_does_not_name_is_not_read(tmp_path: Path) -> None:
    make_store(tmp_path / "acts", 960, GRID, window=4)
    (tmp_path / "acts/manifest/train/0-000001.jsonl").unlink()
    split = ActivationStore(tmp_path / "acts").train
    split.tensor("layers.0.mlp/input", 0)
    with pytest.raises(StoreError, match="the manifest has no line for this shard"):
        split.tensor("layers.0.mlp/input", 4)


def test_commands_name_the_file_and_exit_with_2(
    store_copy: Path, run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The case that was found: a shard of document numbers, with other numbers in it."""
    held_out = store_copy / "data.zarr/held_out/tokens/doc_id/c"
    first = min(held_out.iterdir())
    raw = first.read_bytes()  # rows of a document that is not there, footer and size the same
    first.write_bytes(b"\7\0\0\0" * 20 + raw[80:])
    with pytest.raises(SystemExit) as done:
        main(["eval", str(run.folder), "--store", str(store_copy), "--no-probe"])
    said = capsys.readouterr().err
    assert done.value.code == 2 and f"doc_id/c/{first.name}: changed since" in said
    assert "Traceback" not in said
    train = store_copy / "data.zarr/layers.2.mlp/input/c/0/0"
    damage(train)
    command = ["train", "--store", str(store_copy), "--runs", str(tmp_path), "--batch-rows", "256",
               "--k", "4", "--n-latents", "64", "--hookpoint", "layers.2.mlp"]  # fmt: skip
    with pytest.raises(SystemExit) as done:
        main(command)
    said = capsys.readouterr().err
    assert done.value.code == 2 and "layers.2.mlp/input/c/0/0: changed since" in said
    with pytest.raises(SystemExit) as done:
        main([*command, "--no-check", "--name", "trusting"])
    assert (
        done.value.code == 0
        and torch.isfinite(
            Run.open(tmp_path / "trusting").coder("layers.2.mlp/skip_transcoder-binary-k4-s0").W_dec
        ).all()
    )


@pytest.mark.parametrize("codec", ["raw", "lz4", "int8"])
def test_the_ends_of_a_manifest_s_lines_say_what_the_whole_lines_say(
    tmp_path: Path, codec: Codec
) -> None:
    make_store(tmp_path / "acts", 960, GRID, window=4, codec=codec)
    folder = open_folder(tmp_path / "acts")
    for window in range(3):
        record = read_window(folder, "train", 0, window)
        assert record is not None
        expected = {(s.array, s.shard): (s.bytes, s.xxh3_128) for s in record.shards}
        assert read_shard_hashes(folder, "train", 0, window) == expected
    assert read_shard_hashes(folder, "train", 0, 3) == {}
    path = tmp_path / "acts/manifest/train/0-000001.jsonl"
    path.write_text(path.read_text().replace('"bytes": ', '"bytes": 1', 1))
    with pytest.raises(StoreError, match=r"0-000001.jsonl: cut or changed"):
        read_shard_hashes(folder, "train", 0, 1)

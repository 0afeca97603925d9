"""What can go wrong on a cluster: disks, models, files and other programs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import bsc.cache.capture.capture as capture_module
from bsc.cache.capture.capture import capture
from bsc.cache.capture.source import Source
from bsc.cache.store.store import ActivationStore
from bsc.cache.store.verify import verify
from bsc.errors import StoreError, UserError
from bsc.records import sealed
from tests.cache.captures import config_of
from tests.cache.synthetic import files_of

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MB, where this process may mount one."""
    where = Path(tempfile.mkdtemp(prefix="bsc-disk-"))  # not where pytest removes old folders
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(where)], capture_output=True,
        check=False,
    )  # fmt: skip
    if done.returncode:
        pytest.skip(
            "mounting a tmpfs needs root; test_a_full_disk_stops_the_capture_with_what_is_committed"
            " covers the same with an error raised in the writer"
        )
    yield where
    subprocess.run(["umount", "--lazy", str(where)], check=True)
    where.rmdir()


def test_a_disk_that_fills_up_keeps_what_is_committed_and_goes_on_when_there_is_room(
    tiny_model: Path, tmp_path: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = small_disk / "acts"
    ballast = small_disk / "another.file"
    ballast.write_bytes(bytes(3_600_000))
    # Somebody else fills the disk after the check.
    monkeypatch.setattr("bsc.cache.capture.capture.check_disk", lambda *args: None)
    with pytest.raises(
        UserError, match=r"writing the store failed \(No space left on device\)"
    ) as e:
        capture(config_of(str(tiny_model), store))
    assert "rows that were committed before are whole; the same command goes on" in str(e.value)
    assert list(verify(store)) == [] and not ActivationStore(store).complete
    assert not list(store.rglob("*.partial"))
    ballast.unlink()
    capture(config_of(str(tiny_model), store))
    capture(config_of(str(tiny_model), tmp_path / "whole"))
    assert files_of(store) == files_of(tmp_path / "whole")


def spoil(monkeypatch: pytest.MonkeyPatch, rows: int, value: float) -> None:
    """The model overflows in the first rows of its first batches."""
    real = Source.rows
    left = rows

    def spoiled(self: Any, batch: Any) -> Any:
        nonlocal left
        made = real(self, batch)
        if batch.split == "train" and left:
            n = min(left, 3)
            made["layers.1.mlp/output"] = made["layers.1.mlp/output"].clone()
            made["layers.1.mlp/output"][:n, 5] = value
            left -= n
        return made

    monkeypatch.setattr(Source, "rows", spoiled)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_model_that_overflows_is_refused_by_default_and_kept_by_flag(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    spoil(monkeypatch, 4, value)
    with pytest.raises(UserError, match=r"layers\.1\.mlp/output: \d of [\d,]+ rows hold values th"):
        capture(config_of(str(tiny_model), tmp_path / "refused"))
    assert not (tmp_path / "refused").exists()
    spoil(monkeypatch, 4, value)
    capture(config_of(str(tiny_model), tmp_path / "kept", max_non_finite=0.01))
    store = ActivationStore(tmp_path / "kept")
    assert store.train.non_finite_rows("layers.1.mlp/output") == 4
    assert store.train.moments("layers.1.mlp/output").mean.isfinite().all()
    assert list(verify(tmp_path / "kept")) == []


def test_a_text_that_ends_early_says_how_many_rows_there_are_and_why(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capture(config_of(str(tiny_model), tmp_path / "acts", tokens=50_000, window=64))
    said = " ".join(capsys.readouterr().err.split())
    assert "the text ended after" in said and "training tokens of 50,000 that were asked" in said
    completed = json.loads((tmp_path / "acts/provenance.json").read_text())["completed"]
    store = ActivationStore(tmp_path / "acts")
    assert completed["text_ended"] and completed["rows"]["train"] == store.train.rows > 5_000
    assert 0 <= completed["dropped_rows"]["train"] < store.train.grid.shard_rows
    assert list(verify(tmp_path / "acts")) == []


def test_a_store_of_a_newer_format_is_refused_by_name(store_copy: Path) -> None:
    path = store_copy / "data.zarr/zarr.json"
    path.write_text(path.read_text().replace('"version": 3', '"version": 4'))
    with pytest.raises(StoreError, match="format version 4, this bsc reads version 3"):
        ActivationStore(store_copy)
    assert any("format version 4" in p for p in verify(store_copy))


def test_a_read_only_store_is_read_and_verified(store_copy: Path) -> None:
    for path in [store_copy, *store_copy.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    command = [sys.executable, "-m", "bsc", "verify", str(store_copy)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    for path in [store_copy, *store_copy.rglob("*")]:
        path.chmod(0o755 if path.is_dir() else 0o644)


def test_a_store_that_is_being_written_is_right_as_far_as_it_goes(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Source.block
    seen: list[int] = []

    def meanwhile(self: Any, batch: Any) -> Any:
        store = tmp_path / "acts"
        if store.exists():
            assert list(verify(store)) == []
            opened = ActivationStore(store)
            assert not opened.complete
            seen.append(opened.train.rows)
        return real(self, batch)

    monkeypatch.setattr(Source, "block", meanwhile)
    capture(config_of(str(tiny_model), tmp_path / "acts"))
    assert len(set(seen)) >= 3 and seen == sorted(seen)


def interrupt(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C once at least one window is committed: the second one is full by then."""
    real = Source.block
    calls = 0

    def interrupted(self: Any, batch: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 12:
            raise KeyboardInterrupt
        return real(self, batch)

    monkeypatch.setattr(Source, "block", interrupted)


def test_ctrl_c_leaves_a_store_to_go_on_with(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = tmp_path / "acts"
    with monkeypatch.context() as patch:
        interrupt(patch)
        with pytest.raises(KeyboardInterrupt):
            capture(config_of(str(tiny_model), store))
    assert not list(store.rglob("*.partial")) and list(verify(store)) == []
    assert 0 < ActivationStore(store).train.rows < 3_600
    capture(config_of(str(tiny_model), store))
    capture(config_of(str(tiny_model), tmp_path / "whole"))
    assert files_of(store) == files_of(tmp_path / "whole")


@pytest.mark.parametrize("damage", ["cut", "foreign", "other", "newer"])
def test_a_damaged_manifest_stops_a_resumed_capture_with_its_name(
    tiny_model: Path, tmp_path: Path, damage: str
) -> None:
    store = tmp_path / "acts"
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch)
        with pytest.raises(KeyboardInterrupt):
            capture(config_of(str(tiny_model), store))
    path = sorted((store / "manifest/train").glob("*.jsonl"))[-1]
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-30])
    elif damage == "foreign":
        path.write_text("hello\n")
    elif damage == "other":
        path.write_bytes(sorted((store / "manifest/held_out").glob("*.jsonl"))[-1].read_bytes())
    else:
        provenance = store / "provenance.json"
        made = json.loads(provenance.read_text())
        made["capture"]["format_version"] = 9
        provenance.write_bytes(sealed(made))
    expected = r"format_version is 9" if damage == "newer" else rf"{path.name}: "
    with pytest.raises(UserError, match=expected):
        capture(config_of(str(tiny_model), store))


def test_something_else_in_the_folder_is_never_written_over(
    tiny_model: Path, tmp_path: Path
) -> None:
    (tmp_path / "acts").mkdir()
    (tmp_path / "acts/thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="not empty, so no store can be started in it"):
        capture(config_of(str(tiny_model), tmp_path / "acts"))
    assert [p.name for p in (tmp_path / "acts").iterdir()] == ["thesis.tex"]
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        capture(config_of(str(tiny_model), tmp_path / "file"))


def test_an_empty_folder_and_a_link_to_one_can_become_a_store(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    capture(config_of(str(tiny_model), tmp_path / "link"))
    assert list(verify(tmp_path / "empty")) == []
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    capture(config_of(str(tiny_model), Path(".")))
    assert list(verify(tmp_path / "here")) == []


def test_a_channel_that_is_silent_at_first_does_not_ruin_its_rows(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = Source.rows, 0

    def late(self: Any, batch: Any) -> Any:
        nonlocal calls
        calls += 1
        made = real(self, batch)
        if calls == 1:  # the batch that the scales come from
            made["layers.1.mlp/output"] = made["layers.1.mlp/output"].clone()
            made["layers.1.mlp/output"][:, 3] *= 1e-6
        return made

    monkeypatch.setattr(Source, "rows", late)
    capture(config_of(str(tiny_model), tmp_path / "acts", codec="int8"))
    completed = json.loads((tmp_path / "acts/provenance.json").read_text())["completed"]
    assert completed["fvu_of_stored_rows"]["layers.1.mlp/output"]["total"] < 0.1


def test_flags_that_do_not_go_together_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    def refused(match: str, **fields: object) -> None:
        with pytest.raises(ValueError, match=match):  # of the config, or of the capture
            capture(config_of(str(tiny_model), tmp_path / "acts", **fields))
        assert not (tmp_path / "acts").exists()

    refused("--rank 2: ranks of 2 processes go from 0 to 1", rank=2, world=2)
    refused("should be 'masked', 'joined' or 'none'", packing="tight")
    refused("should be 'raw', 'lz4' or 'int8'", codec="zip")
    refused("--ring 1: at least 2 shards", ring=1)
    refused("--ring 5: at least 6 shards are needed, two for each writer", ring=5, world=3)
    with pytest.raises(ValueError, match="--ring needs a file system"):
        config_of(str(tiny_model), tmp_path).but(store="s3://b/acts", ring=8)
    refused(r"--world 9000: the store has [\d,]+ shards of 1 rows, fewer", world=9000)


def test_rank_without_world_and_torchrun(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bsc.devices import rank_and_world

    assert rank_and_world(None, None) == (0, 1) and rank_and_world(2, 3) == (2, 3)
    with pytest.raises(UserError, match="--rank and --world belong together"):
        rank_and_world(1, None)
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert rank_and_world(None, None) == (3, 8)


def test_a_copy_of_a_store_elsewhere_is_the_same_store(store_path: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(store_path, tmp_path / "a name with blanks" / "acts")
    assert list(verify(moved)) == []
    assert ActivationStore(moved).store_id == ActivationStore(store_path).store_id


def test_an_lz4_shard_with_a_hostile_index_is_refused(tmp_path: Path) -> None:
    from bsc.cache.store.layout import Grid
    from bsc.cache.store.shard import index_bytes
    from tests.cache.synthetic import make_store

    make_store(tmp_path / "s", 192, Grid(96, 24, 2), window=2, codec="lz4")
    shard = tmp_path / "s/data.zarr/layers.0.mlp/input/c/0/0"
    raw = shard.read_bytes()
    footer = 16 * 4 + 4
    for lengths in ([10**12, 1, 1, 1], [1, 1, 1, 1], [len(raw), 0, 0, 0]):
        shard.write_bytes(raw[:-footer] + index_bytes(lengths))
        with pytest.raises(StoreError, match=r"c/0/0: chunk \d"):
            ActivationStore(tmp_path / "s", check=False).train.tensor("layers.0.mlp/input", 0)
    assert os.path.getsize(shard) == len(raw) and torch.get_num_threads() >= 1


def test_an_int8_capture_goes_on_with_the_scales_that_the_store_has(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not with ones that it finds again, which other hardware could make differ."""
    store = tmp_path / "acts"
    with monkeypatch.context() as patch:
        interrupt(patch)
        with pytest.raises(KeyboardInterrupt):
            capture(config_of(str(tiny_model), store, codec="int8"))

    def refuse(*_: object) -> None:
        raise AssertionError("the scales are in the store")

    with monkeypatch.context() as patch:
        patch.setattr(capture_module, "channel_scales", refuse)
        capture(config_of(str(tiny_model), store, codec="int8"))
    capture(config_of(str(tiny_model), tmp_path / "whole", codec="int8"))
    assert files_of(store) == files_of(tmp_path / "whole")
    completed = json.loads((store / "provenance.json").read_text())["completed"]
    for figures in completed["fvu_of_stored_rows"].values():
        assert 1e-6 < figures["total"] < 1e-3 and 1e-6 < figures["median_channel"] < 1e-3


def test_going_on_with_other_versions_is_said(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    store = tmp_path / "acts"
    with monkeypatch.context() as patch:
        interrupt(patch)
        with pytest.raises(KeyboardInterrupt):
            capture(config_of(str(tiny_model), store))
    monkeypatch.setattr(capture_module, "versions", lambda: {"torch": "9.9"})
    capture(config_of(str(tiny_model), store))
    said = " ".join(capsys.readouterr().err.split())
    assert "going on with {'torch': '9.9'}; rows may differ in their last bits" in said
    assert "interrupted; the same command goes on with what is committed" in said

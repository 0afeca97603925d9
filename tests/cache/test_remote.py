"""A store in object storage, over the real S3 protocol on this machine."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from bsc.cache.capture.capture import capture
from bsc.cache.capture.config import CaptureConfig
from bsc.cache.model.text_source import TextSource
from bsc.cache.store.folder import open_folder
from bsc.cache.store.layout import Grid
from bsc.cache.store.loader import Loader
from bsc.cache.store.remote import RemoteFolder
from bsc.cache.store.store import ActivationStore
from bsc.cache.store.verify import verify
from bsc.describe import describe
from bsc.errors import StoreError, UserError
from bsc.eval.config import EvalConfig
from bsc.eval.evaluate import evaluate
from bsc.train.config import TrainConfig
from bsc.train.trainer import train_sweep
from tests.cache.objects import BUCKET, bucket, server, upload
from tests.cache.synthetic import files_of, make_store, numbers

GRID = Grid(96, 24, 10)
__all__ = ["bucket", "server"]  # fixtures


def cached_bytes(tmp_path: Path) -> int:
    return sum(p.stat().st_size for p in (tmp_path / "cache").rglob("*") if p.is_file())


def test_an_uploaded_store_reads_as_the_local_one_and_verifies(
    bucket: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_store(tmp_path / "s", 960, GRID, window=4)
    url = upload(bucket, tmp_path / "s")
    local, remote = ActivationStore(tmp_path / "s"), ActivationStore(url)
    assert remote.complete and remote.store_id == local.store_id
    assert numbers(remote).tolist() == numbers(local).tolist()
    assert list(verify(url)) == []
    assert describe(url)["splits"] == describe(tmp_path / "s")["splits"]
    key = "acts/data.zarr/layers.0.mlp/input/c/3/0"
    raw = bytearray(bucket.Object(key).get()["Body"].read())
    raw[7] ^= 1
    bucket.Object(key).put(Body=bytes(raw))
    (problem,) = verify(url)  # what the bucket has, not what was read before
    assert f"{url}/data.zarr/layers.0.mlp/input/c/3/0: chunk 0" in problem
    bucket.Object(key).delete()
    assert list(verify(url)) == [f"{url}/{key.removeprefix('acts/')}: missing"]
    monkeypatch.setenv("BSC_SHARD_CACHE", str(tmp_path / "empty-cache"))
    with pytest.raises(StoreError, match=r"c/3/0: this committed shard is missing"):
        ActivationStore(url).train.tensor("layers.0.mlp/input", 3)


def test_a_shard_is_got_once_and_the_cache_stays_within_its_bound(
    bucket: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_store(tmp_path / "s", 960, GRID, window=4)
    url = upload(bucket, tmp_path / "s")
    got: list[str] = []
    import obstore

    real = obstore.get

    def spy(store: Any, key: str, **options: Any) -> Any:
        got.append(key)
        return real(store, key, **options)

    monkeypatch.setattr(obstore, "get", spy)
    split = ActivationStore(url).train
    names = ("layers.0.mlp/input", "layers.0.mlp/output")
    loader = Loader(split, names, batch_rows=48, seed=0)
    rows = [torch.cat([*b], dim=1).clone() for b in islice(loader.batches(), 20)]
    shards = [k for k in got if "/c/" in k]
    assert sorted(shards) == sorted(set(shards)) and len(shards) == 20
    local = Loader(ActivationStore(tmp_path / "s").train, names, batch_rows=48, seed=0)
    for a, b in zip(rows, local.batches(), strict=False):
        assert torch.equal(a, torch.cat([*b], dim=1))

    # A cache of six shards: an epoch passes through it, within its bound.
    bound = 6 * (96 * 12 + 16 * 4 + 4)
    monkeypatch.setenv("BSC_SHARD_CACHE", str(tmp_path / "cache" / "small"))
    monkeypatch.setenv("BSC_SHARD_CACHE_BYTES", str(bound))
    split = ActivationStore(url).train
    small = Loader(split, names, batch_rows=48, seed=0, shards_at_once=2)
    most = 0
    for _ in zip(small.batches(), range(20), strict=False):
        sizes: dict[int, int] = {}
        assert isinstance(split.folder, RemoteFolder)
        with split.folder._mutex:  # what is read ahead waits while we count
            for path in (tmp_path / "cache" / "small").rglob("*"):
                with suppress(FileNotFoundError):  # it gets its name meanwhile
                    status = path.stat()
                    sizes[status.st_ino] = status.st_size if path.is_file() else 0
        most = max(most, sum(sizes.values()))
    assert 0 < most <= bound


def test_a_cache_too_small_for_what_is_read_at_a_time_is_said_once(
    bucket: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_store(tmp_path / "s", 960, GRID, window=4)
    monkeypatch.setenv("BSC_SHARD_CACHE_BYTES", str(3 * 96 * 12))
    split = ActivationStore(upload(bucket, tmp_path / "s")).train
    names = ("layers.0.mlp/input", "layers.0.mlp/output")
    loader = Loader(split, names, batch_rows=48, seed=0, shards_at_once=4)
    rows = [torch.cat([*b], dim=1).clone() for b in islice(loader.batches(), 20)]
    local = Loader(ActivationStore(tmp_path / "s").train, names, batch_rows=48, seed=0)
    for a, b in zip(rows, local.batches(), strict=False):
        assert torch.equal(a, torch.cat([*b], dim=1))
    said = capsys.readouterr().err
    assert said.count("fetched twice") == 1 and "Set BSC_SHARD_CACHE_BYTES" in said


def test_shards_that_come_at_the_same_time_are_within_the_bound_together(
    bucket: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_store(tmp_path / "s", 960, GRID, window=4)
    monkeypatch.setenv("BSC_SHARD_CACHE_BYTES", str(3 * 96 * 12))
    folder = open_folder(upload(bucket, tmp_path / "s"))
    assert isinstance(folder, RemoteFolder)
    keys = [f"data.zarr/layers.0.mlp/input/c/{shard}/0" for shard in range(3)]
    for key in keys[:2]:
        folder.local(key)  # two of three places are taken, and metadata are in the cache too
    everybody = threading.Barrier(2)
    made_room = RemoteFolder._make_room

    def spy(self: RemoteFolder, size: int, partial: Path) -> None:
        made_room(self, size, partial)
        everybody.wait(30)  # nothing has been written yet

    monkeypatch.setattr(RemoteFolder, "_make_room", spy)
    with ThreadPoolExecutor() as threads:
        got = threads.map(folder.local, [keys[2], keys[2].replace("input", "output")])
        assert all(path.is_file() for path in got)
    assert cached_bytes(tmp_path) <= 3 * 96 * 12


def test_capture_straight_to_object_storage_gives_the_objects_of_a_local_capture(
    bucket: Any, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def config(store: Path | str) -> CaptureConfig:
        return CaptureConfig(
            model=str(tiny_model), store=store, text=TextSource(corpus="stdlib", held_out=0.2),
            hookpoints=("layers.1.mlp",), tokens=3_600, held_out_tokens=600, context=32,
            batch_tokens=256, window=6,
        )  # fmt: skip

    url = f"s3://{BUCKET}/live"
    puts: list[str] = []
    publish = RemoteFolder.publish

    def spy(self: RemoteFolder, key: str) -> None:
        puts.append(key)
        publish(self, key)

    monkeypatch.setattr(RemoteFolder, "publish", spy)
    # Killed once on the way, then gone on with.
    claim = open_folder(url).claim(0)
    with pytest.raises(UserError, match=rf"process {os.getpid()} on .* is writing part 0"):
        open_folder(url).claim(0)
    claim.release(remove=True)
    real = RemoteFolder.write

    def die(self: RemoteFolder, key: str, data: bytes) -> None:
        if "manifest/train/0-000001" in key:
            raise KeyboardInterrupt
        real(self, key, data)

    with monkeypatch.context() as patch:
        patch.setattr(RemoteFolder, "write", die)
        with pytest.raises(KeyboardInterrupt):
            capture(config(url))
    assert not ActivationStore(url).complete and list(verify(url)) == []
    capture(config(url))
    capture(config(tmp_path / "local"))
    objects = {
        o.key.removeprefix("live/"): o.get()["Body"].read()
        for o in bucket.objects.filter(Prefix="live/")
    }
    objects.pop("provenance.json")
    assert objects == files_of(tmp_path / "local")
    assert all(puts.count(key) <= 2 for key in puts)  # twice: those of the window that was lost
    assert not list((tmp_path / "cache").rglob("*.partial"))


def test_training_and_evaluation_read_from_object_storage(
    bucket: Any, store_path: Path, tmp_path: Path
) -> None:
    url = upload(bucket, store_path, "run")
    sweeps = [
        TrainConfig(
            store=where, runs=tmp_path / name, batch_rows=256,
            coders=({"hookpoint": "layers.2.mlp", "k": [4], "n_latents": 64},),
        )
        for name, where in (("remote", url), ("local", store_path))
    ]  # fmt: skip
    (remote, _), (local, _) = (train_sweep(s) for s in sweeps)
    assert remote.config()["store"] == url
    name = remote.coder_names()[0]
    a, b = ((r.coder_folder(name) / "coder.safetensors").read_bytes() for r in (remote, local))
    assert a == b
    figures = [
        evaluate(r, EvalConfig(ce_tokens=512, probes=()))["coders"][name]["fvu"]
        for r in (remote, local)
    ]
    assert figures[0] == figures[1]


def test_a_creation_that_was_killed_is_no_hindrance(
    bucket: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"s3://{BUCKET}/half"
    write, calls = RemoteFolder.write, 0

    def die(self: RemoteFolder, key: str, data: bytes) -> None:
        nonlocal calls
        calls += 1
        if calls > 4:
            raise KeyboardInterrupt
        write(self, key, data)

    with monkeypatch.context() as patch:
        patch.setattr(RemoteFolder, "write", die)
        with pytest.raises(KeyboardInterrupt):
            make_store(url, 960, GRID, window=4)  # type: ignore[arg-type]
    open_folder(url).check_new()
    make_store(url, 960, GRID, window=4)  # type: ignore[arg-type]
    assert list(verify(url)) == []


def test_mistakes_have_one_message(bucket: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StoreError, match="no such folder"):
        ActivationStore(f"s3://{BUCKET}/nothing")
    with pytest.raises(UserError, match="not an address of object storage"):
        open_folder("ftp://somewhere/acts")
    bucket.Object("taken/file.txt").put(Body=b"x")
    with pytest.raises(UserError, match="something is there already"):
        open_folder(f"s3://{BUCKET}/taken").check_new()
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    done = subprocess.run(
        [sys.executable, "-m", "bsc", "info", f"s3://{BUCKET}/acts"], capture_output=True,
        text=True, env={**os.environ, "AWS_ALLOW_HTTP": "true"}, timeout=240,
    )  # fmt: skip
    assert done.returncode == 2 and "Traceback" not in done.stderr and "secret" not in done.stderr
    assert done.stderr.startswith(f"error: s3://{BUCKET}/acts")

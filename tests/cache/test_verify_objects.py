"""`verify` of a store in object storage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bsc.cache.store.remote import RemoteFolder
from bsc.cache.store.store import ActivationStore
from bsc.cache.store.verify import verify
from tests.cache.checking import checked, made, read, store
from tests.cache.objects import BUCKET, bucket, server, upload

__all__ = ["bucket", "made", "read", "server", "store"]  # fixtures


def test_object_storage_by_threads_and_gone_on_with(
    bucket: Any, store: Path, tmp_path: Path, read: list[str]
) -> None:
    url = upload(bucket, store)
    journal = tmp_path / "kept.jsonl"
    key = "acts/data.zarr/layers.0.mlp/input/c/4/0"
    right = bucket.Object(key).get()["Body"].read()
    bucket.Object(key).put(Body=right[:7] + b"x" + right[8:])
    problems, *_ = checked(url, journal, jobs=3)
    assert len(problems) == 1 and "input/c/4/0: chunk 0" in problems[0]
    assert problems == list(verify(url, jobs=1))
    bucket.Object(key).put(Body=right)
    # Of the same size: it is the etag that tells.
    other = "acts/data.zarr/layers.0.mlp/input/c/9/0"
    raw = bucket.Object(other).get()["Body"].read()
    bucket.Object(other).put(Body=raw[:7] + b"x" + raw[8:])
    read.clear()
    problems, _, taken = checked(url, journal, jobs=3)
    assert len(problems) == 1 and f"s3://{BUCKET}/acts" in problems[0] and "c/9/0" in problems[0]
    assert len(read) == 36 and taken == ActivationStore(url).bytes * 4 // 10


def test_a_copy_of_an_object_that_made_room_for_another_is_no_missing_shard(
    bucket: Any, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = upload(bucket, store)
    real, gone = RemoteFolder.fresh, set[str]()

    def fresh(self: RemoteFolder, key: str) -> Path:
        path = real(self, key)
        if key not in gone:  # as another thread's copy can make it
            gone.add(key)
            path.unlink()
        return path

    monkeypatch.setattr(RemoteFolder, "fresh", fresh)
    assert list(verify(url, jobs=3)) == [] and len(gone) == 60

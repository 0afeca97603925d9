"""Object storage on this machine, by the real S3 protocol."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from moto.server import ThreadedMotoServer

__all__ = ["BUCKET", "bucket", "server", "upload"]

BUCKET = "activations"


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    running = ThreadedMotoServer(port=0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    yield f"http://{host}:{port}"
    running.stop()


@pytest.fixture
def bucket(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    for name, value in {
        "AWS_ENDPOINT_URL": server, "AWS_ACCESS_KEY_ID": "id", "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_REGION": "us-east-1", "BSC_SHARD_CACHE": str(tmp_path / "cache"),
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    s3 = boto3.resource("s3", endpoint_url=server, region_name="us-east-1",
                        aws_access_key_id="id", aws_secret_access_key="secret")  # fmt: skip
    made = s3.create_bucket(Bucket=BUCKET)
    yield made
    made.objects.all().delete()
    made.delete()


def upload(bucket: Any, root: Path, prefix: str = "acts") -> str:
    for path in root.rglob("*"):
        if path.is_file():
            bucket.upload_file(str(path), f"{prefix}/{path.relative_to(root).as_posix()}")
    return f"s3://{BUCKET}/{prefix}"

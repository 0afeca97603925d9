"""Object storage that fails: nothing is lost, and there is one clear message."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from moto.server import ThreadedMotoServer

from bsc.cache.capture.capture import capture
from bsc.cache.capture.config import CaptureConfig
from bsc.cache.model.text_source import TextSource
from bsc.cache.store import remote
from bsc.cache.store.folder import open_folder
from bsc.cache.store.store import ActivationStore
from bsc.cache.store.verify import verify
from bsc.cli import main
from bsc.errors import StoreError
from tests.cache.faulty import FaultyServer, faulty

BUCKET = "faults"


@pytest.fixture(scope="module")
def proxy() -> Iterator[tuple[str, FaultyServer]]:
    moto = ThreadedMotoServer(port=0, verbose=False)
    moto.start()
    host, port = moto.get_host_and_port()
    with faulty(f"http://{host}:{port}") as found:
        yield found
    moto.stop()


@pytest.fixture
def server(
    proxy: tuple[str, FaultyServer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[FaultyServer]:
    address, server = proxy
    for name, value in {
        "AWS_ENDPOINT_URL": address, "AWS_ACCESS_KEY_ID": "id", "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_REGION": "us-east-1", "BSC_SHARD_CACHE": str(tmp_path / "cache"),
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    server.fault = lambda method, path: None
    s3 = boto3.resource("s3", endpoint_url=address, region_name="us-east-1",
                        aws_access_key_id="id", aws_secret_access_key="secret")  # fmt: skip
    bucket: Any = s3.create_bucket(Bucket=BUCKET)
    server.seen.clear()
    yield server
    server.fault = lambda method, path: None
    bucket.objects.all().delete()
    bucket.delete()


URL = f"s3://{BUCKET}/acts"


def config(model: Path) -> CaptureConfig:
    return CaptureConfig(
        model=str(model), store=URL, hookpoints=("layers.1.mlp",), tokens=1_000,
        text=TextSource(corpus="stdlib", held_out=0.3), held_out_tokens=300, context=16,
        batch_tokens=256,
    )  # fmt: skip


def test_a_server_that_is_gone_for_five_seconds_is_waited_for(
    server: FaultyServer, tiny_model: Path
) -> None:
    began: list[float] = []

    def gone(method: str, path: str) -> str | None:
        if "/c/3" in path and not began:
            began.append(time.monotonic())
        return "down" if began and time.monotonic() < began[0] + 5 else None

    server.fault = gone
    capture(config(tiny_model))
    assert [what for *_, what in server.seen].count("down") > 2
    assert list(verify(URL)) == []


def test_503_is_tried_again(server: FaultyServer, tiny_model: Path) -> None:
    count = [0]

    def busy(method: str, path: str) -> str | None:
        count[0] += 1
        return "503" if count[0] % 12 == 0 else None

    server.fault = busy
    capture(config(tiny_model))
    assert [what for *_, what in server.seen].count("503") > 5
    server.fault = lambda method, path: None
    assert list(verify(URL)) == []


@pytest.mark.parametrize("part", ["writer-0.lock", "store.lock", "/c/2", "manifest", "zarr.json"])
def test_a_put_whose_answer_is_lost_is_a_put(
    part: str, server: FaultyServer, tiny_model: Path
) -> None:
    server.once("PUT", part, "lost")
    capture(config(tiny_model))
    assert ("lost" in [what for *_, what in server.seen]) and list(verify(URL)) == []


def test_an_object_that_breaks_off_is_got_again(
    server: FaultyServer, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(remote._RETRY, "max_retries", 4)
    capture(config(tiny_model))
    server.once("GET", "layers.1.mlp/input/c/0", "cut")
    whole = ActivationStore(URL).train.tensor("layers.1.mlp/input", 0).clone()
    assert "cut" in [what for *_, what in server.seen] and whole.isfinite().all()
    server.fault = lambda method, path: "cut" if "layers.1.mlp/input/c/1" in path else None
    with pytest.raises(StoreError, match=r"c/1/0: "):
        ActivationStore(URL).train.tensor("layers.1.mlp/input", 1)
    # `open_folder` promises a folder of whatever kind; this one has a place for copies.
    assert not list(Path(open_folder(URL)._place).rglob("*.partial"))  # type: ignore[attr-defined]


def test_wrong_credentials_get_one_message(
    server: FaultyServer, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.fault = lambda method, path: "403"
    for command in (
        ["info", URL], ["verify", URL], ["train", "--store", URL],
        ["cache", "--model", str(tiny_model), "--text", "stdlib", "--store", URL],
    ):  # fmt: skip
        with pytest.raises(SystemExit) as done:
            main(command)
        said = capsys.readouterr().err
        assert done.value.code == 2 and "Traceback" not in said
        errors = [line for line in said.splitlines() if line.startswith("error:")]
        assert len(errors) == 1 and "refuses the credentials" in errors[0], said
        assert "secret" not in said

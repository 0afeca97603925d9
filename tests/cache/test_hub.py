"""`bsc cache --model SmolLM2-135M` through transformers' and huggingface_hub's own client.

A loopback server (tests/hub.py) serves the embedded model under that id. The command runs in a
process of its own, with HF_ENDPOINT set and an empty cache.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from bsc.cache.store.store import ActivationStore
from tests.conftest import EMBEDDED
from tests.hub import COMMIT, hub_environment, serve_hub

REPO = "HuggingFaceTB/SmolLM2-135M"


@pytest.fixture
def hub() -> Iterator[tuple[str, list[str]]]:
    with serve_hub({REPO: EMBEDDED}) as served:
        yield served


def bsc_cache(
    endpoint: str, folder: Path, model: str, *more: str
) -> subprocess.CompletedProcess[str]:
    environment = hub_environment(endpoint, folder / "hf")
    return subprocess.run(
        [sys.executable, "-m", "bsc", "cache", "--model", model, "--store", str(folder / "acts"),
         "--text", "stdlib", "--tokens", "1000", "--context", "32", "--batch-tokens", "512",
         "--hookpoints", "layers.{1,4}.mlp", *more],
        capture_output=True, text=True, env=environment, timeout=240,
    )  # fmt: skip


def test_the_short_name_is_downloaded_from_the_hub_and_captured(
    hub: tuple[str, list[str]], tmp_path: Path
) -> None:
    endpoint, requests = hub
    done = bsc_cache(endpoint, tmp_path, "SmolLM2-135M")
    assert done.returncode == 0, done.stderr
    assert any(r == f"GET /{REPO}/resolve/{COMMIT}/model.safetensors" or
               (r.startswith(f"GET /{REPO}/resolve/") and r.endswith("model.safetensors"))
               for r in requests), requests  # fmt: skip
    assert not [r for r in requests if r.endswith((".bin", ".pt", ".pkl")) and r.startswith("GET")]
    store = ActivationStore(tmp_path / "acts")
    assert store.attributes["model"]["name"] == REPO
    assert store.attributes["model"]["revision"] == COMMIT

    # The rows are those of the embedded model, which is what the server served.
    local = bsc_cache(endpoint, tmp_path / "local", str(EMBEDDED))
    assert local.returncode == 0, local.stderr
    same = ActivationStore(tmp_path / "local/acts")
    for name in ("layers.1.mlp/input", "layers.4.mlp/output"):
        for shard in range(store.train.shards):
            a, b = (s.train.shard(name, shard).view(np.uint16) for s in (store, same))
            assert np.array_equal(a, b)


def test_a_model_that_the_hub_does_not_have_gets_one_message(
    hub: tuple[str, list[str]], tmp_path: Path
) -> None:
    done = bsc_cache(hub[0], tmp_path, "nobody/nothing")
    assert done.returncode == 2
    assert (
        done.stderr.startswith("error: --model nobody/nothing:") and "Traceback" not in done.stderr
    )
    assert not (tmp_path / "acts").exists()


def test_no_network_gets_one_message(tmp_path: Path) -> None:
    done = bsc_cache("http://127.0.0.1:9", tmp_path, "SmolLM2-135M")
    assert done.returncode == 2, done.stderr
    message = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(message) == 1 and "cannot be reached. What works offline" in message[0]
    assert "Retry" not in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "acts").exists()

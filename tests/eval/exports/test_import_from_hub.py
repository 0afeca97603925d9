"""`bsc import hub://...` through huggingface_hub's own client and a loopback server."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bsc.eval.exports.export import export_coders
from bsc.train.run import Run
from tests.hub import COMMIT, hub_environment, serve_hub

REPO = "somebody/coders"


def bsc_import(
    endpoint: str, folder: Path, store: Path, source: str
) -> subprocess.CompletedProcess[str]:
    environment = hub_environment(endpoint, folder / "hf")
    return subprocess.run(
        [sys.executable, "-m", "bsc", "import", source, "--store", str(store), "--runs",
         str(folder / "runs")],
        capture_output=True, text=True, env=environment, timeout=120,
    )  # fmt: skip


@pytest.fixture
def repository(run: Run, tmp_path: Path) -> Path:
    """Two coders of sparsify's, and files that are none of ours."""
    export_coders(run, ["skip_transcoder-*-k8*"], "sparsify-binary", tmp_path / "repo")
    (tmp_path / "repo" / "README.md").write_text("# Coders")
    (tmp_path / "repo" / "run.py").write_text("raise SystemExit")
    return tmp_path / "repo"


def test_coders_come_from_a_commit_of_a_repository(
    repository: Path, store_path: Path, tmp_path: Path
) -> None:
    with serve_hub({REPO: repository}) as (endpoint, requests):
        done = bsc_import(endpoint, tmp_path, store_path, f"hub://{REPO}@main/layers.2.mlp")
    assert done.returncode == 0, done.stderr
    made = Run.open(tmp_path / "runs" / "imported")
    assert len(made.coder_names()) == 2
    about = made.coder(made.coder_names()[0]).about["imported"]
    assert about["revision"] == COMMIT and about["source"].startswith(f"hub://{REPO}")
    fetched = {r.rpartition("/")[2] for r in requests if r.startswith("GET") and "/resolve/" in r}
    assert fetched == {"cfg.json", "sae.safetensors"}


@pytest.mark.parametrize(
    ("source", "claims", "message"),
    [
        (f"hub://{REPO}@other", [], "no such repository or revision"),
        ("hub://nobody/nothing", [], "no such repository or revision"),
        (f"hub://{REPO}/layers.9.mlp", [], "no files of a coder here"),
        (f"hub://{REPO}/../x", [], "should be hub://owner/name"),
        ("hub://coders", [], "should be hub://owner/name"),
        (f"hub://{REPO}", [{"rfilename": "../../cfg.json", "size": 1}], "which is not fetched"),
        (f"hub://{REPO}", [{"rfilename": "/etc/cfg.json", "size": 1}], "which is not fetched"),
        (f"hub://{REPO}", [{"rfilename": "a/ae.pt", "size": 11 << 30}], "more than 10.7 GB"),
    ],
)
def test_what_is_not_there_or_hostile_is_one_line(
    source: str, claims: list[dict[str, Any]], message: str, repository: Path, store_path: Path,
    tmp_path: Path,
) -> None:  # fmt: skip
    with serve_hub({REPO: repository}, claims) as (endpoint, requests):
        done = bsc_import(endpoint, tmp_path, store_path, source)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    (line,) = (x for x in done.stderr.splitlines() if x.startswith("error:"))
    assert message in line
    assert not (tmp_path / "runs").exists()
    assert not [r for r in requests if "/resolve/" in r], "nothing was fetched"


def test_without_a_network_it_is_said_at_once(
    repository: Path, store_path: Path, tmp_path: Path
) -> None:
    done = bsc_import("http://127.0.0.1:9", tmp_path, store_path, f"hub://{REPO}")
    assert done.returncode == 2 and "does not answer" in done.stderr
    assert json.loads((repository / "export.json").read_text())["format"] == "sparsify-binary"

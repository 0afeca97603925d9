"""The command for a machine with a GPU, on a CPU: all parts run, and what is wrong is a failure."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import bench_gpu
from tests.cuda.scenarios import configs


def findings(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
def test_every_part_runs(tmp_path: Path) -> None:
    """Slow for the step, which is compiled too."""
    out = tmp_path / "found.jsonl"
    status = bench_gpu.main(["--device", "cpu", "--tiny", "--out", str(out)])
    lines = findings(out)
    failed = [line for line in lines if "failed" in line and line["part"] != "end"]
    # No compiler here is no failure of the script.
    assert all(line["what"].startswith("compiled") for line in failed), failed
    assert status == bool(failed)
    assert {line["part"] for line in lines} == {*bench_gpu.PARTS, "end"}
    (steps, *_) = (line for line in lines if line.get("what") == "steps")
    assert steps["eager_over_products"]["median"] > 0


def test_a_wrong_result_is_a_finding_and_the_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "found.jsonl"
    some = list(configs())[:2]
    monkeypatch.setattr(bench_gpu, "configs", lambda: iter(some))
    run = ["--device", "cpu", "--tiny", "--out", str(out), "--parts", "correct", "waits"]
    assert bench_gpu.main(run) == 0
    assert {line["what"] for line in findings(out) if line["part"] == "waits"} == {
        name for name, _ in some
    }
    right = bench_gpu._apart
    monkeypatch.setattr(bench_gpu, "_apart", lambda a, b: right(a, b) + 0.5)
    assert bench_gpu.main(run) == 1
    (first, *_) = findings(out)
    assert "off by 0.5" in first["failed"], first


def test_without_a_gpu_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit):
        bench_gpu.main(["--out", str(tmp_path / "found.jsonl")])
    assert not (tmp_path / "found.jsonl").exists()

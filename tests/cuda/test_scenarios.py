"""On a CUDA device that is not there: no tensor on the wrong device, no missing kernel, and no more
waiting for the device than is said here. See machine.py for how, and for what this cannot see."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bsc.train.coders import kernels
from bsc.train.coders.kernels import Entries

ROOT = Path(__file__).resolve().parents[2]
CODERS, PIECES = 2, 2
"""Of a step of a bank (scenarios.py)."""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    if shutil.which("g++") is None:
        pytest.skip("no g++: it compiles the device guard that a torch for CPUs lacks")
    path = tmp_path_factory.mktemp("cuda") / "found.jsonl"
    done = subprocess.run(
        [sys.executable, "-m", "tests.cuda.scenarios", str(path)],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return {line["what"]: line for line in lines}


def allowed(what: str) -> int:
    """Times that the host may wait for the device."""
    kind = what.split(": ", 1)[-1].split(",")[0]
    # Whether a row could hold more than was looked at, and how many latents are dead.
    own = 1 if "batch top-k" in kind or "AuxK" in kind else 0
    if what.startswith("step "):
        return own * CODERS * PIECES
    if what.startswith("trainer step"):
        return 1 + own * 3  # one read for the bank
    if what.startswith("metrics"):
        return 1
    if what.startswith("encode"):
        return 1 if "batch top-k" in kind else 0  # the widest row
    if what.startswith("pass over rows"):
        return 3 + (1 if "batch top-k" in kind else 0)
    # A counter that was saved on the host; whether all rows are finite.
    return {"optimiser after a resume: signum": 1, "capture: rows of a batch": 1}.get(what, 0)


def test_everything_ran_and_nothing_lacks_a_kernel(found: dict[str, dict[str, Any]]) -> None:
    kinds = {what.split(": ")[0] for what in found}
    assert {"step torch.float64", "step torch.bfloat16", "optimiser", "trainer step"} <= kinds
    assert len(found) > 200
    assert {what: line["missing"] for what, line in found.items() if line["missing"]} == {}


def test_the_host_waits_no_more_than_it_has_to(found: dict[str, dict[str, Any]]) -> None:
    waits = {what: sum(line["syncs"].values()) for what, line in found.items()}
    too_many = {what: found[what]["syncs"] for what, n in waits.items() if n > allowed(what)}
    assert too_many == {}
    assert waits["trainer step: topk"] == 1, "the one read is counted"


def test_what_runs_where_torch_lacks_a_kernel_is_the_same() -> None:
    generator = torch.Generator().manual_seed(0)
    table, grad = (torch.randn(n, 24, generator=generator) for n in (40, 50))
    entries = Entries.of(torch.stack([torch.randperm(40, generator=generator)[:7] for _ in grad]))
    for dtype, near in ((torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        given = grad.to(dtype), table.to(dtype), entries
        expected = kernels.decoder_dot(*given)
        for at_once in (24, 1_000, 1 << 26):
            pieces = kernels.decoder_dot_by_pieces(*given, values_at_once=at_once)
            assert pieces.dtype == dtype
            torch.testing.assert_close(pieces, expected, rtol=near, atol=near)


@pytest.mark.parametrize(
    ("version", "device", "dtype", "by_pieces"),
    [
        ("2.8.0", "cuda", torch.bfloat16, True),
        ("2.12.1+cu130", "cuda", torch.bfloat16, True),
        ("2.13.0", "cuda", torch.bfloat16, False),
        ("2.8.0", "cuda", torch.float32, False),
        ("2.8.0", "cpu", torch.bfloat16, False),
    ],
)
def test_the_choice_is_by_version_device_and_dtype(
    monkeypatch: pytest.MonkeyPatch, version: str, device: str, dtype: torch.dtype, by_pieces: bool
) -> None:
    monkeypatch.setattr(torch, "__version__", version)
    kernels._by_pieces.cache_clear()
    try:
        assert kernels._by_pieces(torch.device(device), dtype) == by_pieces
    finally:
        kernels._by_pieces.cache_clear()

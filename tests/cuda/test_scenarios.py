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
from tests.cuda.scenarios import bank_of, configs, rows_of

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
        # One read for the bank, and one of the numbers of dead latents.
        return 2 if "AuxK" in kind else 1 + own * 3
    if what.startswith("metrics"):
        return 1
    if what.startswith("encode"):
        return 1 if "batch top-k" in kind else 0  # the widest row
    if what.startswith("finetuning"):
        return 2 if "batch top-k" in kind else 0  # the widest row, of two encodings
    if what.startswith("calibration"):
        return 2 + (1 if "batch top-k" in kind else 0)  # two sums at its end
    if what.startswith("pass over rows"):
        return 1 + (1 if "batch top-k" in kind else 0)
    # A counter that was saved on the host; whether all rows are finite; the sums themselves.
    return int(
        what
        in (
            "optimiser after a resume: signum",
            "capture: rows of a batch",
            "losses of a batch of contexts",
        )
    )


def test_everything_ran_and_nothing_lacks_a_kernel(found: dict[str, dict[str, Any]]) -> None:
    kinds = {what.split(": ")[0] for what in found}
    assert {"step torch.float64", "step torch.bfloat16", "optimiser", "trainer step"} <= kinds
    assert "finetuning bf16, a coder and a batch" in kinds
    assert len(found) > 200
    assert {what: line["missing"] for what, line in found.items() if line["missing"]} == {}


def test_sums_are_added_up_in_one_order(found: dict[str, dict[str, Any]]) -> None:
    assert {what: line["any_order"] for what, line in found.items() if line["any_order"]} == {}
    assert any(what.startswith("calibration") for what in found)


def test_the_host_waits_no_more_than_it_has_to(found: dict[str, dict[str, Any]]) -> None:
    waits = {what: sum(line["syncs"].values()) for what, line in found.items()}
    too_many = {what: found[what]["syncs"] for what, n in waits.items() if n > allowed(what)}
    assert too_many == {}
    assert waits["trainer step: topk"] == 1, "the one read is counted"


@pytest.mark.parametrize("often", [0.0, 0.5, 1.0], ids=["even", "half", "every row"])
@pytest.mark.parametrize("longest", [1, 7, 512])
def test_sums_by_pieces_are_the_sums(often: float, longest: int) -> None:
    """Whatever the latent that fires most, and with latents that never fire."""
    generator = torch.Generator().manual_seed(0)
    index = torch.stack([torch.randperm(40, generator=generator)[:7] for _ in range(300)])
    index[torch.rand(300, generator=generator) < often, 0] = 50  # F is 60: 41 to 49 never fire
    entries = Entries.of(index)
    code = kernels.transpose(entries, 60)
    for dtype, near in ((torch.float64, 1e-12), (torch.bfloat16, 0.05)):
        weight = torch.randn(len(entries.latent), generator=generator).to(dtype)
        rows = torch.randn(300, 24, generator=generator).to(dtype)
        expected = kernels.latent_sums(code, weight, rows)
        pieces = kernels.latent_sums_by_pieces(code, weight, rows, longest)
        assert pieces.dtype == dtype
        scale = float(expected.abs().max())
        torch.testing.assert_close(pieces, expected, rtol=near, atol=near * scale)


def test_dead_latents_are_the_same_counted_or_not() -> None:
    config = next(c for name, c in configs() if name.startswith("binary AuxK"))
    x, y = rows_of(config, torch.float64)
    found = []
    for counted in (False, True):
        bank = bank_of(config, "cpu", torch.float64)
        assert bank.dead is not None
        if counted:
            bank.n_dead = bank.dead.sum(dim=1).tolist()
        bank.step(x, y)
        found.append({name: g.clone() for name, g in bank.gradients.items()})
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_what_runs_where_torch_lacks_a_kernel_is_the_same() -> None:
    generator = torch.Generator().manual_seed(0)
    table, grad = (torch.randn(n, 24, generator=generator) for n in (40, 50))
    entries = Entries.of(torch.stack([torch.randperm(40, generator=generator)[:7] for _ in grad]))
    for dtype, near in ((torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        given = grad.to(dtype), table.to(dtype), kernels.transpose(entries, 40)
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

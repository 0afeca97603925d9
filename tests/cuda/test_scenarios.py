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


@pytest.mark.parametrize("longest", [1, 7, 64])
def test_no_bag_is_longer_than_the_longest(longest: int) -> None:
    """Pieces that are none, of latents that never fire, would else all be in the last bag."""
    index = torch.randint(0, 3, (400, 1), generator=torch.Generator().manual_seed(0))
    index[:150] = 3
    code = kernels.transpose(Entries.of(index), 5_000)
    pieces = kernels.pieces_of(code.offsets, 400, longest)
    for starts, end in ((pieces.starts, 400), (pieces.offsets, len(pieces.number))):
        lengths = torch.diff(starts.long(), append=torch.tensor([end]))
        assert lengths.min() >= 0 and lengths.max() <= max(longest, 150 // longest + 1)


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
        of = kernels.pieces_of(code.offsets, len(code.row), longest)
        pieces = kernels.latent_sums_by_pieces(code, of, weight, rows)
        assert pieces.dtype == dtype and pieces.shape == expected.shape
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


def test_what_runs_where_torch_lacks_a_kernel_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients of codes from what was not rounded, and from what was, are alike."""
    config = next(c for name, c in configs() if name == "topk, sae")
    x, y = rows_of(config, torch.bfloat16)
    found = []
    for exact in (False, True):
        monkeypatch.setattr(kernels, "dots_in_float32", lambda *_, exact=exact: exact)
        bank = bank_of(config, "cpu", torch.bfloat16)
        bank.step(x, y)
        found.append({name: g.clone() for name, g in bank.gradients.items()})
    for name, gradient in found[0].items():
        assert float((gradient - found[1][name]).norm()) <= 2e-2 * float(gradient.norm()), name
    assert not torch.equal(found[0]["encoder.weight"], found[1]["encoder.weight"])


@pytest.mark.parametrize(
    ("version", "device", "dtype", "exact"),
    [
        ("2.8.0", "cuda", torch.bfloat16, True),
        ("2.12.1+cu130", "cuda", torch.bfloat16, True),
        ("2.13.0", "cuda", torch.bfloat16, False),
        ("2.8.0", "cuda", torch.float32, False),
        ("2.13.0", "cpu", torch.bfloat16, True),
    ],
)
def test_the_choice_is_by_version_device_and_dtype(
    monkeypatch: pytest.MonkeyPatch, version: str, device: str, dtype: torch.dtype, exact: bool
) -> None:
    monkeypatch.setattr(torch, "__version__", version)
    kernels.dots_in_float32.cache_clear()
    try:
        assert kernels.dots_in_float32(torch.device(device), dtype) == exact
    finally:
        kernels.dots_in_float32.cache_clear()

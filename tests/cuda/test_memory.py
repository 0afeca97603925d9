"""Memory that steps need on a GPU alone, measured on a CPU, which can run the same functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from bsc.train.coders import kernels
from bsc.train.coders.bank import EXTRA_COLUMNS
from bsc.train.coders.kernels import Entries
from bsc.train.config import SweepPoint, TrainConfig
from bsc.train.memory import plan_memory
from bsc.train.sweep import plan_coders

ROWS, LATENTS, WIDTH, K = 4000, 3000, 128, 16


def passing_bytes(work: Callable[[], torch.Tensor]) -> int:
    """The most that is allocated at a time, beside the result."""
    result = work()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        result = work()
    now = most = 0
    events: Any = profiled.profiler
    for event in events.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most - result.nbytes


def test_pieces_take_what_is_planned_for_them() -> None:
    generator = torch.Generator().manual_seed(0)
    index = torch.stack([torch.randperm(LATENTS, generator=generator)[:K] for _ in range(ROWS)])
    code, dtype = kernels.transpose(Entries.of(index), LATENTS), torch.bfloat16
    rows, weight = torch.randn(ROWS, WIDTH).to(dtype), torch.randn(ROWS * K).to(dtype)

    def work() -> torch.Tensor:
        pieces = kernels.pieces_of(code.offsets, ROWS * K)
        return kernels.latent_sums_by_pieces(code, pieces, weight, rows)

    planned = kernels.bytes_by_pieces(LATENTS, WIDTH, ROWS * K, dtype)
    assert 0.9 < passing_bytes(work) / planned <= 1.02


def test_the_plan_for_a_gpu_has_them(store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    planned = plan_coders([SweepPoint(hookpoint="layers.2.mlp", n_latents=4096)], store)
    config = TrainConfig(batch_rows=8192, micro_rows=8192)
    coder, device = planned[0].coder, torch.device("cuda")
    width = coder.d_in + EXTRA_COLUMNS
    needed = kernels.bytes_by_pieces(4096, width, 8192 * coder.k, torch.bfloat16)
    with_them = plan_memory(planned, config, device, 2**40).workspace
    monkeypatch.setattr(kernels, "bytes_by_pieces", lambda *_: 0)
    without = plan_memory(planned, config, device, 2**40).workspace
    assert with_them - without == needed

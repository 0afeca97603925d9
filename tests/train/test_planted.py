"""Coders recover dictionaries that are known, and AuxK revives latents."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bsc.train.coders.bank import Bank
from bsc.train.coders.config import CoderConfig
from bsc.train.optim import CoderOptimiser
from bsc.train.schedule import lr_scale

D, TRUE, K = 64, 96, 4
"""More directions than dimensions, few of them at a time."""


class Planted:
    """Rows that are sums of K of TRUE unit directions, with weights that are 1 or drawn."""

    def __init__(self, seed: int, code: str) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        directions = torch.randn(TRUE, D, generator=self.generator)
        self.directions = directions / directions.norm(dim=1, keepdim=True)
        self.code = code
        rows = self.rows(20_000)
        self.mean = rows.mean(0)
        self.variance = float((rows - self.mean).square().sum(1).mean())

    def rows(self, n: int) -> torch.Tensor:
        chosen = torch.rand(n, TRUE, generator=self.generator).topk(K, dim=1).indices
        weight = torch.ones(n, K)
        if self.code == "continuous":
            weight = 0.5 + torch.rand(n, K, generator=self.generator)
        rows: torch.Tensor = torch.zeros(n, TRUE).scatter(1, chosen, weight) @ self.directions
        return rows


def train(planted: Planted, steps: int, seed: int = 0, lr: float = 0.01, **fields: Any) -> Bank:
    """An SAE trained on fresh rows by Adam, warm-up and decay."""
    base: dict[str, Any] = {"site": "sae", "k": K, "n_latents": 256, "d_in": D, "d_out": D}
    bank = Bank([CoderConfig(**base | fields)], total_variance=planted.variance)
    bank.initialise([seed], planted.mean, planted.mean)
    optimiser = CoderOptimiser("adam", bank.trained(0), lr)
    last_fired = torch.zeros(256, dtype=torch.int64)
    for step in range(steps):
        x = planted.rows(1024)
        bank.dead = (step - last_fired > 50).unsqueeze(0)
        result = bank.step(x, x)
        last_fired[result.fired[0]] = step
        optimiser.step(lr * lr_scale(step, steps, 0.05, "linear"))
        bank.renormalise(0)
    return bank


def recovered(planted: Planted, bank: Bank) -> float:
    """Mean over true directions of the largest cosine with a decoder row."""
    w = bank.decoder(0)
    w = w / w.norm(dim=1, keepdim=True).clamp(min=1e-9)
    return float((planted.directions @ w.T).amax(1).mean())


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(
    ("code", "fields"),
    [
        ("binary", {}),
        ("continuous", {}),
        ("continuous", {"decoder_norm": "unit"}),
    ],
    ids=["binary", "continuous", "continuous, unit rows"],
)
def test_a_planted_dictionary_is_recovered(code: str, fields: dict[str, Any], seed: int) -> None:
    planted = Planted(seed, code)
    bank = train(planted, 800, seed, code=code, **fields)
    found = recovered(planted, bank)
    assert found > 0.9, found


def test_a_dictionary_is_not_recovered_by_chance() -> None:
    """What the figure above is for coders that did not train."""
    planted = Planted(0, "binary")
    bank = train(planted, 0, code="binary")
    assert recovered(planted, bank) < 0.5


_INITIALISE = Bank.initialise


def _half_low(self: Bank, *args: Any) -> None:
    _INITIALISE(self, *args)
    self.parameters["encoder.bias"][0, 24:] = -0.6


def test_auxk_revives_dead_latents() -> None:
    """Latents that begin far below all others stay dead without it."""
    planted = Planted(0, "continuous")
    fired = {}
    for alpha in (0.0, 1 / 32):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Bank, "initialise", _half_low)
            bank = train(planted, 300, code="continuous", auxk_alpha=alpha, auxk_k=64)
        x = planted.rows(4096)
        fired[alpha] = int(bank.step(x, x).fired[0, 24:].sum())
    assert fired[0.0] < 15 and fired[1 / 32] > 50, fired

"""Coders recover dictionaries that are known, and AuxK revives latents."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bsc.cache.store.layout import Hookpoint
from bsc.train.coders.bank import Bank
from bsc.train.config import SweepPoint
from bsc.train.optim import CoderOptimiser
from bsc.train.schedule import lr_scale
from bsc.train.sweep import plan_coder

D, TRUE, K, F = 32, 96, 4, 192
"""More directions than dimensions, few of them at a time."""
STEPS, BATCH = 800, 512
KINDS = [
    (site, code, select)
    for site in ("sae", "transcoder", "skip_transcoder")
    for code in ("binary", "continuous", "hybrid")
    for select in ("topk", "groupmax", "batch_topk")
]


def _directions(generator: torch.Generator) -> torch.Tensor:
    drawn = torch.randn(TRUE, D, generator=generator)
    return torch.nn.functional.normalize(drawn)


class Planted:
    """Rows of K of TRUE latents that are 1 or of drawn strength, in units of their rms.

    An SAE sees y alone; a transcoder sees the same latents in x by other directions; for a skip
    transcoder y has a linear part besides.
    """

    def __init__(self, seed: int, site: str, code: str) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.code, self.linear = code, torch.zeros(D, D)
        self.out = _directions(self.generator)
        self.inside = self.out if site == "sae" else _directions(self.generator)
        if site == "skip_transcoder":
            self.linear = torch.randn(D, D, generator=self.generator) / D**0.5
        self.units = (1.0, 1.0)
        x, y = self.rows(20_000)
        self.units = (float(x.std(0, correction=0).square().mean() ** 0.5),
                      float(y.std(0, correction=0).square().mean() ** 0.5))  # fmt: skip
        x, y = self.rows(20_000)
        self.means = (x.mean(0), y.mean(0))
        self.variance = float((y - self.means[1]).square().sum(1).mean())

    def rows(self, n: int) -> tuple[torch.Tensor, torch.Tensor]:
        chosen = torch.rand(n, TRUE, generator=self.generator).topk(K, dim=1).indices
        drawn = 0.5 + torch.rand(n, K, generator=self.generator)
        varies = {"continuous": TRUE, "hybrid": TRUE // 2, "binary": 0}[self.code]
        weight = torch.where(chosen < varies, drawn, torch.ones(n, K))
        latents = torch.zeros(n, TRUE).scatter(1, chosen, weight)
        x = latents @ self.inside
        y = latents @ self.out + x @ self.linear
        return x / self.units[0], y / self.units[1]

    def recovered(self, bank: Bank) -> float:
        """Mean over true directions of the largest cosine with a decoder row.

        What a skip path does not take of the linear part, the latents have to: any skip path has
        its own true directions.
        """
        true = (self.out + self.inside @ self.linear) / self.units[1]
        if "W_skip" in bank.parameters:
            true = true - self.inside @ bank.parameters["W_skip"][0].T / self.units[0]
        true = true / true.norm(dim=1, keepdim=True)
        w = bank.decoder(0)
        w = w / w.norm(dim=1, keepdim=True).clamp(min=1e-9)
        return float((true @ w.T).amax(1).mean())


def train(planted: Planted, steps: int, **fields: Any) -> Bank:
    """A coder of the sweep's defaults, trained on fresh rows as the trainer does it."""
    point = SweepPoint(**{"k": K, "n_latents": F} | fields)
    plan = plan_coder(point, Hookpoint("planted", D, D))
    bank = Bank([plan.coder], total_variance=planted.variance)
    bank.initialise([plan.seed], *planted.means)
    optimiser = CoderOptimiser(plan.optimiser, bank.trained(0), plan.lr)
    last_fired = torch.zeros(F, dtype=torch.int64)
    for step in range(steps):
        bank.dead = (step - last_fired > 50).unsqueeze(0)
        result = bank.step(*planted.rows(BATCH))
        last_fired[result.fired[0]] = step
        optimiser.step(plan.lr * lr_scale(step, steps, plan.warmup, plan.decay))
        bank.renormalise(0)
    return bank


@pytest.mark.slow
@pytest.mark.parametrize(("site", "code", "select"), KINDS, ids=["-".join(k) for k in KINDS])
def test_the_default_of_every_kind_recovers_a_planted_dictionary(
    site: str, code: str, select: str
) -> None:
    planted = Planted(0, site, code)
    found = planted.recovered(train(planted, STEPS, site=site, code=code, select=select))
    assert found > 0.9, found


def test_binary_latents_of_one_length_do_not_recover_it() -> None:
    """Unit rows without amplitudes, the paper's: why they are not the default."""
    planted = Planted(0, "sae", "binary")
    bank = train(planted, STEPS, site="sae", code="binary", amplitude="none")
    assert planted.recovered(bank) < 0.88


@pytest.mark.parametrize(
    "fields",
    [
        {"optimiser": "signum"},
        {"optimiser": "muon"},
        {"threshold": "newton"},
        {"surrogate": "gumbel", "select": "groupmax", "gumbel_support": "full"},
    ],
    ids=["signum", "muon", "newton", "full gumbel"],
)
def test_other_settings_recover_it_too(fields: dict[str, Any]) -> None:
    planted = Planted(1, "transcoder", "binary")
    found = planted.recovered(train(planted, STEPS, site="transcoder", code="binary", **fields))
    assert found > 0.9, found


def test_a_dictionary_is_not_recovered_by_chance() -> None:
    """What the figure above is for coders that did not train."""
    planted = Planted(0, "sae", "binary")
    assert planted.recovered(train(planted, 0, site="sae", code="binary")) < 0.6


_INITIALISE = Bank.initialise


def _half_low(self: Bank, *args: Any) -> None:
    _INITIALISE(self, *args)
    self.parameters["encoder.bias"][0, 24:] = -2.4


def test_auxk_revives_dead_latents() -> None:
    """Latents that begin far below all others stay dead without it."""
    planted = Planted(0, "sae", "continuous")
    fired = {}
    for alpha in (0.0, 1 / 32):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Bank, "initialise", _half_low)
            bank = train(planted, 300, site="sae", code="continuous", auxk_alpha=alpha, auxk_k=64)
        fired[alpha] = int(bank.step(*planted.rows(4096)).fired[0, 24:].sum())
    assert fired[0.0] < 15 and fired[1 / 32] > 50, fired


@pytest.mark.parametrize("code", ["binary", "continuous"])
def test_a_penalty_keeps_latents_from_firing_above_the_cap(code: str) -> None:
    """Every true latent fires on 4 % of the rows, so without it so do those that found one."""
    planted = Planted(0, "transcoder", code)
    often = {}
    for penalty in (0.0, 0.1):
        bank = train(
            planted, 300, site="transcoder", code=code, rate_penalty=penalty, rate_cap=0.03
        )
        x, _ = planted.rows(20_000)
        found = bank.export(0).encode(x)
        fired = torch.bincount(found.latent[found.value != 0].long(), minlength=F)
        often[penalty] = int((fired > 0.035 * len(x)).sum())
    assert often[0.0] > 30 and often[0.1] < 5, often

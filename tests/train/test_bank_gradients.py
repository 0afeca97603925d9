"""The bank's forward pass and gradients against autograd in float64, from the definitions.

The reference is dense and follows docs/coders.md line by line: autograd differentiates the
continuous coder itself, and the binary one with its step replaced by the surrogate's definition.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from bsc.train.coders import passes
from bsc.train.coders.bank import Bank
from bsc.train.coders.coder import SparseCoder
from bsc.train.coders.config import CoderConfig
from tests.train.reference import reference

SITES = ("sae", "transcoder", "skip_transcoder")
CODES = ("continuous", "binary")


@pytest.fixture(autouse=True)
def several_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is passed over some latents at a time has more than one piece here."""
    monkeypatch.setattr(passes, "_BLOCK", 24)


def coder_config(**fields: Any) -> CoderConfig:
    return CoderConfig(**fields)


def make_bank(configs: list[CoderConfig], seed: int = 0) -> Bank:
    """A bank in float64 with random parameters."""
    bank = Bank(configs, total_variance=3.7, compute_dtype=torch.float64, dtype=torch.float64)
    g = torch.Generator().manual_seed(seed)
    for name, p in bank.parameters.items():
        p.copy_(torch.randn(p.shape, generator=g, dtype=p.dtype))
        if name == "log_threshold":
            p.mul_(0.3).sub_(0.5)
    for c in range(len(configs)):
        bank.renormalise(c)
    bank._centre.copy_(torch.randn(bank.d_in, generator=g, dtype=p.dtype))
    return bank


def batch(d_in: int, d_out: int, site: str, n: int = 29) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    y = torch.randn(n, d_out, generator=g, dtype=torch.float64)
    x = y if site == "sae" else torch.randn(n, d_in, generator=g, dtype=torch.float64)
    return x, y


def check(bank: Bank, x: Tensor, y: Tensor, micro_rows: int | None = None) -> list[Tensor]:
    """Compare every coder of a bank with the reference; returns the codes."""
    for gradient in bank.gradients.values():
        gradient.fill_(7.0)  # a step overwrites what was there
    result = bank.step(x, y, micro_rows=micro_rows)
    codes = []
    for c, config in enumerate(bank.configs):
        p = {n: t[c].clone().requires_grad_() for n, t in bank.parameters.items()}
        dead = None if bank.dead is None else bank.dead[c]
        loss, whole, code = reference(config, p, x, y, bank.total_variance, dead)
        whole.backward()
        torch.testing.assert_close(result.loss[c], loss.detach())
        assert not result.loss[c].requires_grad
        for name in bank.names(c):
            expected = p[name].grad
            assert expected is not None
            if name == "log_threshold":
                expected = expected[config.first_binary :]
            torch.testing.assert_close(
                bank.trained(c)[name][1],
                expected,
                rtol=1e-9,
                atol=1e-12,
                msg=f"gradient of {name}",
            )
        on = code.detach() != 0
        assert torch.equal(result.fired[c], on.any(0))
        torch.testing.assert_close(result.l0[c].double(), on.double().sum(1).mean())
        codes.append(code.detach())
    return codes


@pytest.mark.parametrize(
    ("site", "code", "k", "shape"),
    [
        (site, code, k, shape)
        for site, code, k in itertools.product(SITES, CODES, (1, 3, 16))
        for shape in ((5, 5, 16), (7, 4, 33))
        if site != "sae" or shape[0] == shape[1]
    ],
)
def test_forward_and_every_gradient_are_those_of_autograd(
    site: str, code: str, k: int, shape: tuple[int, int, int]
) -> None:
    d_in, d_out, n_latents = shape
    base = {
        "site": site,
        "code": code,
        "k": k,
        "n_latents": n_latents,
        "d_in": d_in,
        "d_out": d_out,
    }
    norms = ("unit", "free") if site == "sae" else ("free",)
    for norm in norms:
        bank = make_bank([coder_config(**base, decoder_norm=norm)])
        check(bank, *batch(d_in, d_out, site))


AXES: dict[str, dict[str, Any]] = {
    "identity": {"code": "binary", "surrogate": "identity"},
    "rectangle": {"code": "binary", "surrogate": "rectangle", "temperature": 1.3},
    "re": {"code": "binary", "surrogate": "re", "temperature": 1.7},
    "newton": {"code": "binary", "threshold": "newton"},
    "newton rectangle": {"code": "binary", "threshold": "newton", "surrogate": "rectangle"},
    "newton groupmax": {"code": "binary", "threshold": "newton", "select": "groupmax"},
    "newton multi top-k": {"code": "binary", "threshold": "newton", "multi_topk": True},
    "hybrid newton": {"code": "hybrid", "threshold": "newton"},
    "exact k": {"code": "binary", "exact_k": True},
    "fixed threshold": {"code": "binary", "threshold": "fixed"},
    "groupmax": {"select": "groupmax"},
    "binary groupmax": {"code": "binary", "select": "groupmax"},
    "gumbel": {"code": "binary", "select": "groupmax", "surrogate": "gumbel"},
    "full gumbel": {
        "code": "binary",
        "select": "groupmax",
        "surrogate": "gumbel",
        "gumbel_support": "full",
    },
    "batch top-k": {"select": "batch_topk"},
    "binary batch top-k": {"code": "binary", "select": "batch_topk"},
    "hybrid": {"code": "hybrid"},
    "uneven hybrid": {"code": "hybrid", "k_binary": 1, "n_binary": 20},
    "hybrid groupmax": {"code": "hybrid", "select": "groupmax"},
    "hybrid batch top-k": {"code": "hybrid", "select": "batch_topk"},
    "multi top-k": {"multi_topk": True},
    "binary multi top-k": {"code": "binary", "multi_topk": True},
    "AuxK": {"auxk_alpha": 1 / 32},
    "binary AuxK": {"code": "binary", "auxk_alpha": 0.5, "auxk_k": 20},
    **{
        f"{code} {surrogate} AuxK": {
            "code": code,
            "surrogate": surrogate,
            "auxk_alpha": 0.5,
            "auxk_k": 20,
            "temperature": 1.3,
        }
        for code in ("binary", "hybrid")
        for surrogate in ("identity", "rectangle", "re")
    },
    "rate penalty": {"rate_penalty": 0.7},
    "rate penalty of all": {"code": "binary", "rate_penalty": 0.7, "rate_cap": 0.0},
    "rate penalty, exact k": {"code": "binary", "exact_k": True, "rate_penalty": 0.7},
    "rate penalty, rectangle": {"code": "hybrid", "surrogate": "rectangle", "rate_penalty": 0.7},
    "rate penalty, multi top-k": {"code": "binary", "multi_topk": True, "rate_penalty": 0.7},
    "hybrid AuxK and multi top-k": {"code": "hybrid", "auxk_alpha": 0.5, "multi_topk": True},
}


@pytest.mark.parametrize(("axes", "site"), itertools.product(AXES, SITES))
def test_every_axis_has_the_gradients_of_its_definition(axes: str, site: str) -> None:
    base: dict[str, Any] = {
        "site": site,
        "k": 4,
        "n_latents": 32,
        "d_in": 6,
        "d_out": 6 if site == "sae" else 5,
    }
    x, y = batch(6, int(base["d_out"]), site)
    variants: list[dict[str, Any]] = [{}]
    if site == "sae":
        variants.append({"decoder_norm": "unit"})
        variants.append({"decoder_norm": "unit", "amplitude": "learned"})
    for variant in variants:
        bank = make_bank([coder_config(**base | AXES[axes] | variant)])
        bank.dead = torch.zeros(1, 32, dtype=torch.bool)
        bank.dead[0, 3:20] = True
        check(bank, x, y)
        # Which select among the rows at hand, or count them (with a cap of 0 all are above).
        counts = "rate_penalty" in AXES[axes] and AXES[axes].get("rate_cap") != 0
        if AXES[axes].get("select") != "batch_topk" and not counts:
            check(bank, x, y, micro_rows=10)


def test_the_gradient_of_auxk_reaches_the_encoder_of_dead_latents_alone() -> None:
    config = coder_config(site="transcoder", k=2, n_latents=16, d_in=5, d_out=6, auxk_alpha=1.0)
    bank = make_bank([config])
    bank.parameters["encoder.bias"][0, 8:] = -30.0  # never selected, yet some way above 0 below
    x, y = batch(5, 6, "transcoder")
    bank.step(x, y)
    assert not bank.gradients["encoder.weight"][0, 8:].any()
    bank.dead = torch.arange(16).unsqueeze(0) >= 12
    bank.parameters["encoder.bias"][0, 12:] = -1.0
    bank.k[0] = 1
    bank.parameters["encoder.bias"][0, 0] = 100.0  # the one that wins everywhere
    bank.step(x, y)
    for name in ("encoder.weight", "encoder.bias", "W_dec"):
        gradient = bank.gradients[name][0]
        assert gradient[12:].any() and not gradient[1:12].any(), name


def test_gumbel_noise_is_drawn_in_training_alone_and_from_its_seed() -> None:
    config = coder_config(
        site="transcoder", code="binary", select="groupmax", surrogate="gumbel", k=4, n_latents=32,
        d_in=6, d_out=6,
    )  # fmt: skip
    x, y = batch(6, 6, "transcoder")
    bank = make_bank([config])
    quiet = bank.step(x, y).fired
    bank.generators = [torch.Generator().manual_seed(3)]
    noisy = [bank.step(x, y).loss.item() for _ in range(2)]
    bank.generators = [torch.Generator().manual_seed(3)]
    assert bank.step(x, y).loss.item() == noisy[0] != noisy[1]
    bank.generators = None
    assert torch.equal(bank.step(x, y).fired, quiet)
    assert torch.equal(bank.export(0).encode(x).value, torch.ones(len(x), 4).double())


def test_batch_topk_keeps_the_smallest_active_margin_as_its_threshold() -> None:
    config = coder_config(
        site="transcoder", select="batch_topk", k=3, n_latents=24, d_in=6, d_out=6
    )
    bank = make_bank([config])
    x, y = batch(6, 6, "transcoder", n=64)
    for _ in range(3):
        fired = bank.step(x, y)
    coder = bank.export(0)
    margins = x @ coder.W_enc.T + coder.b_enc
    floor = margins.flatten().sort(descending=True).values[3 * 64 - 1]
    torch.testing.assert_close(coder.select_threshold, floor.unsqueeze(0))
    # One batch again and again: the saved coder then selects what training did. (Less what the
    # bank's centred rows round away: the smallest margin is the threshold itself.)
    coder.select_threshold.sub_(1e-9)
    code = coder.encode(x)
    assert (code.value != 0).sum() == round(fired.l0.item() * 64)
    torch.testing.assert_close(
        (coder(x) - y).square().sum() / (64 * bank.total_variance), fired.loss[0]
    )
    assert all(len(set(row)) == len(row) for row in code.latent.tolist())
    # And a row's code does not depend on its company.
    torch.testing.assert_close(coder(x[:5]), coder(x)[:5])


def test_a_bank_of_different_coders_gives_each_its_own_gradients() -> None:
    configs = [
        coder_config(site="skip_transcoder", code=code, k=k, n_latents=20, d_in=6, d_out=5,
                    temperature=t)
        for code, k, t in (("binary", 2, 2.0), ("continuous", 7, 2.0), ("binary", 20, 0.5))
    ]  # fmt: skip
    check(make_bank(configs), *batch(6, 5, "skip_transcoder"))


@pytest.mark.parametrize("code", CODES)
def test_a_selected_latent_that_is_off_and_one_that_is_never_selected(code: str) -> None:
    """Every margin below 0: all selected latents are off. The last ten are never selected."""
    config = coder_config(site="transcoder", code=code, k=4, n_latents=16, d_in=5, d_out=5)
    bank = make_bank([config])
    bank.parameters["encoder.bias"][0] = -30.0
    bank.parameters["encoder.bias"][0, 6:] = -300.0
    (codes,) = check(bank, *batch(5, 5, "transcoder"))
    assert not codes.any()
    grad = bank.gradients
    assert not grad["W_dec"][0].any()
    for name in ("encoder.weight", "encoder.bias"):
        assert not grad[name][0, 6:].any()  # never selected: no gradient
        # Selected but off: the surrogate still lets a binary latent learn, relu does not.
        assert grad[name][0, :6].any().item() is (code == "binary")


def test_a_tie_takes_each_latent_once_and_its_loss_is_that_of_a_valid_choice() -> None:
    """Two latents with the same encoder row and decoder row: any choice has the same loss."""
    config = coder_config(site="transcoder", code="binary", k=1, n_latents=2, d_in=3, d_out=3)
    bank = make_bank([config])
    for name in ("encoder.weight", "encoder.bias", "W_dec", "log_threshold"):
        bank.parameters[name][0, 1] = bank.parameters[name][0, 0]
    x, y = batch(3, 3, "transcoder")
    result = bank.step(x, y)
    p = {n: t[0] for n, t in bank.parameters.items()}
    loss, _, code = reference(config, p, x, y, bank.total_variance)
    torch.testing.assert_close(result.loss[0], loss)
    torch.testing.assert_close(result.l0[0].double(), code.sum(1).mean())
    # What the two share between them is what one of them would get alone.
    alone = Bank([config.model_copy(update={"n_latents": 1})], total_variance=3.7,
                 compute_dtype=torch.float64, dtype=torch.float64)  # fmt: skip
    for name, t in alone.parameters.items():
        source = bank.parameters[name]
        t.copy_(source[:, :1] if t.shape != source.shape else source)
    alone.step(x, y)
    for name in ("encoder.weight", "encoder.bias", "W_dec", "log_threshold"):
        torch.testing.assert_close(
            bank.gradients[name][0].sum(0), alone.gradients[name][0].sum(0), rtol=1e-9, atol=1e-12
        )


def test_a_coder_in_a_bank_is_the_same_as_alone() -> None:
    configs = [
        coder_config(site="skip_transcoder", code=code, k=3, n_latents=24, d_in=6, d_out=6)
        for code in CODES
    ]
    x, y = batch(6, 6, "skip_transcoder")
    bank = make_bank(configs)
    bank.step(x, y)
    for c, config in enumerate(configs):
        alone = Bank([config], total_variance=3.7, compute_dtype=torch.float64, dtype=torch.float64)
        for name, t in alone.parameters.items():
            t[0] = bank.parameters[name][c]
        alone.step(x, y)
        for name in alone.names(0):
            torch.testing.assert_close(alone.gradients[name][0], bank.gradients[name][c])


@pytest.mark.parametrize("site", SITES)
def test_the_default_precision_is_near_float64(site: str) -> None:
    """bf16 GEMM, fp32 elsewhere: selections differ on near ties, so compare the loss and the L0."""
    config = coder_config(site=site, code="binary", k=8, n_latents=64, d_in=32, d_out=32)
    exact = make_bank([config])
    fast = Bank([config], total_variance=exact.total_variance)
    for name, t in fast.parameters.items():
        t.copy_(exact.parameters[name])
    x, y = batch(32, 32, site, n=500)
    a, b = exact.step(x, y), fast.step(x, y)
    torch.testing.assert_close(b.loss.double(), a.loss, rtol=0.02, atol=0)
    torch.testing.assert_close(b.l0.double(), a.l0.double(), rtol=0.01, atol=0)


@pytest.mark.parametrize(("site", "code"), itertools.product(SITES, CODES))
def test_an_exported_coder_computes_what_the_bank_trained(site: str, code: str) -> None:
    config = coder_config(site=site, code=code, k=3, n_latents=24, d_in=6, d_out=6,
                         decoder_norm="unit" if site == "sae" else "free")  # fmt: skip
    bank = make_bank([config])
    x, y = batch(6, 6, site)
    loss = bank.step(x, y).loss[0]
    coder: SparseCoder = bank.export(0)
    found = (coder(x) - y).square().sum() / (len(x) * bank.total_variance)
    torch.testing.assert_close(found, loss)
    # In other units it is the same function.
    other = coder.in_units(x=4.0, y=4.0 if site == "sae" else 0.5)
    factor = 4.0 if site == "sae" else 0.5
    torch.testing.assert_close(other(4.0 * x), factor * coder(x))


def test_initial_coders_are_those_of_the_design() -> None:
    mean_x, mean_y = torch.full((6,), 0.5), torch.full((6,), -2.0)
    for site in SITES:
        config = coder_config(site=site, code="binary", k=2, n_latents=12, d_in=6, d_out=6)
        bank = Bank([config, config.model_copy(update={"code": "continuous"})], total_variance=1.0)
        bank.initialise([7, 7], mean_x, mean_y)
        p = bank.parameters
        assert torch.equal(p["encoder.weight"][0], p["encoder.weight"][1])  # one seed, one encoder
        assert p["encoder.weight"].abs().max() <= 6**-0.5
        assert torch.equal(p["b_dec"][0], mean_y)
        torch.testing.assert_close(p["log_threshold"].exp(), torch.full((2, 12), 0.004))
        if site == "sae":
            torch.testing.assert_close(p["W_dec"].norm(dim=2), torch.ones(2, 12))
        else:
            assert not p["W_dec"].any()
            coder = bank.export(0)
            torch.testing.assert_close(coder(torch.randn(3, 6)), mean_y.expand(3, 6))
            pre = mean_x @ coder.W_enc.T + coder.b_enc
            torch.testing.assert_close(pre, torch.zeros(12))

"""A coder as a torch module: the same function, and gradients that are those of training."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from bsc.train.coders.bank import Bank
from bsc.train.coders.coder import SparseCoder
from bsc.train.coders.config import CoderConfig
from bsc.train.coders.module import CoderModule
from tests.eval.exports.kinds import LATENTS, WIDTH, K, kinds, random_coder, rows

KINDS = {f"{site} {name}": config for site, name, config in kinds()}
STEPPED = {n: c for n, c in KINDS.items() if c.surrogate != "gumbel"}


def double(coder: SparseCoder) -> SparseCoder:
    return SparseCoder(coder.config, {n: t.double() for n, t in coder.tensors.items()})


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_module_is_the_coder(kind: str) -> None:
    coder = double(random_coder(KINDS[kind]))
    module = CoderModule(coder)
    x = rows().double()
    assert set(module.state_dict()) == set(coder.tensors)
    a, b = coder.encode(x), module.encode(x)
    dense = [torch.zeros(300, LATENTS).double().scatter_(1, c.latent, c.value) for c in (a, b)]
    torch.testing.assert_close(*(d.detach() for d in dense), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(module(x).detach(), coder(x), rtol=1e-12, atol=1e-10)
    shaped = module(x.view(10, 30, WIDTH))
    torch.testing.assert_close(shaped.view(300, -1), module(x), rtol=1e-12, atol=1e-10)
    again = module.coder()
    assert all(torch.equal(again.tensors[n], t) for n, t in coder.tensors.items())


@pytest.mark.parametrize("kind", STEPPED)
def test_gradients_of_parameters_are_those_of_training(kind: str) -> None:
    """Whose are held to autograd in float64 (test_bank_gradients.py)."""
    config = STEPPED[kind]
    x = rows().double()
    y = x if config.site == "sae" else x.flip(1) * 2
    bank = Bank([config], total_variance=3.0, compute_dtype=torch.float64, dtype=torch.float64)
    start = double(random_coder(config))
    for name, p in bank.parameters.items():
        p[0][config.first_binary if name == "log_threshold" else 0 :] = start.tensors[name]
    bank.step(x, y)
    tensors = dict(start.tensors)
    if config.select == "batch_topk":  # that of this batch, as in training
        pre = start.margins(x)
        ends = [
            pre[:, p.start : p.stop].flatten().topk(300 * p.k).values.min() for p in config.parts
        ]
        tensors["select_threshold"] = torch.stack(ends) - 1e-9  # sums in another order
    module = CoderModule(SparseCoder(config, tensors), surrogate=config.surrogate)
    ((y - module(x)).square().sum() / (300 * 3.0)).backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        expected = bank.gradients[name][0]
        if name == "log_threshold":
            expected = expected[config.first_binary :]
        assert expected.abs().max() > 0 or name == "log_threshold", name
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-9, atol=1e-11, msg=name)


@pytest.mark.parametrize("kind", [n for n, c in KINDS.items() if c.code == "continuous"])
def test_gradients_to_the_rows_are_exact_for_continuous_codes(kind: str) -> None:
    module = CoderModule(double(random_coder(KINDS[kind])))
    x = rows(6).double().requires_grad_()
    assert torch.autograd.gradcheck(module, (x,), eps=1e-7, atol=1e-5)


@pytest.mark.parametrize("surrogate", ["sigmoid", "identity"])
def test_gradients_to_the_rows_go_through_the_named_surrogate(surrogate: str) -> None:
    """Against autograd on step + f(m) - f(m) held fast, f' the surrogate's factor."""
    coder = double(random_coder(KINDS["skip_transcoder binary"]))
    x = rows(20).double()

    def smooth(m: Tensor) -> Tensor:
        t = coder.config.temperature
        return t * torch.sigmoid(m / t) if surrogate == "sigmoid" else m

    a = x.clone().requires_grad_()
    pre = a @ coder.W_enc.T + coder.b_enc - coder.log_threshold.exp()
    m = pre.gather(1, coder.encode(x).latent)
    code = (m > 0).double() + smooth(m) - smooth(m).detach()
    dense = torch.zeros(20, LATENTS).double().scatter(1, coder.encode(x).latent, code)
    (dense @ coder.W_dec + coder.b_dec + a @ coder.W_skip.T).square().sum().backward()
    b = x.clone().requires_grad_()
    CoderModule(coder, surrogate=surrogate)(b).square().sum().backward()
    torch.testing.assert_close(b.grad, a.grad, rtol=1e-10, atol=1e-10)


def test_without_a_surrogate_the_gradient_stops_and_that_is_said_once() -> None:
    module = CoderModule(random_coder(KINDS["sae binary"]))
    with pytest.warns(UserWarning, match="Name a surrogate"):
        module(rows()).sum().backward()
    stopped, flows = module.encoder.weight.grad, module.W_dec.grad
    assert stopped is not None and flows is not None
    assert not stopped.any() and flows.abs().max() > 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module(rows()).sum().backward()
        CoderModule(random_coder(KINDS["sae top-k"]))(rows()).sum().backward()
    with pytest.raises(ValueError, match="should be one of sigmoid"):
        CoderModule(random_coder(KINDS["sae binary"]), surrogate="sigmoidal")


@pytest.mark.parametrize("kind", ["skip_transcoder top-k", "sae binary"])
def test_rows_in_bfloat16_pass_through_weights_in_float32(kind: str) -> None:
    coder = random_coder(KINDS[kind])
    x = rows().bfloat16()
    y = CoderModule(coder, surrogate="sigmoid")(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, coder(x).bfloat16())


def test_it_learns() -> None:
    config = CoderConfig(site="transcoder", code="continuous", k=K, n_latents=LATENTS,
                         d_in=WIDTH, d_out=WIDTH)  # fmt: skip
    module = CoderModule(random_coder(config))
    optimiser = torch.optim.Adam(module.parameters(), lr=1e-2)
    losses: list[Any] = []
    for _ in range(60):
        optimiser.zero_grad()
        loss = (module(rows()) - rows().flip(1)).square().mean()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]

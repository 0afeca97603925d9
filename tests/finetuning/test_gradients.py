"""Gradients of finetuning, held to autograd in float64 through a small model end to end.

The reference knows nothing of the product's hooks, prefixes or sparse operations: it runs the model
with a hook of its own, codes are dense matrices, and the probabilities are those of torch.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from bsc.cache.model.attention import BY_POSITIONS
from bsc.cache.model.models import LanguageModel
from bsc.cache.model.tokens import ContextBatch
from bsc.cache.store.manifest import TextPoint
from bsc.finetuning.config import FinetuneConfig, Loss
from bsc.finetuning.step import Stepper
from bsc.finetuning.tuned_coder import TunedCoder
from bsc.train.coders.coder import SparseCoder
from bsc.train.coders.config import CoderConfig
from bsc.train.coders.surrogates import SURROGATES
from bsc.train.run_config import FinetunedCoder
from bsc.train.training_rows import Scale
from tests.eval.exports.kinds import LATENTS, WIDTH, K, kinds, random_coder

KINDS = {f"{site} {name}": config for site, name, config in kinds()}
for _surrogate in ("identity", "rectangle"):
    KINDS[f"transcoder binary, {_surrogate}"] = CoderConfig(
        site="transcoder", code="binary", surrogate=_surrogate, k=K, n_latents=LATENTS,
        d_in=WIDTH, d_out=WIDTH,
    )  # fmt: skip
KINDS["sae binary, unit rows"] = CoderConfig(
    site="sae", code="binary", decoder_norm="unit", k=K, n_latents=LATENTS, d_in=WIDTH,
    d_out=WIDTH,
)  # fmt: skip
KINDS["sae binary, amplitudes"] = KINDS["sae binary, unit rows"].model_copy(
    update={"amplitude": "learned"}
)
WEIGHT = 2.0
"""How much more than KL reconstruction weighs."""
HOOKS = ("layers.1.mlp", "layers.2.mlp")
UNIT_X, UNIT_Y, VARIANCE = 0.7, 1.3, 5.0


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=WIDTH, num_hidden_layers=4, num_attention_heads=2,
        num_key_value_heads=1, intermediate_size=32, max_position_embeddings=64,
        initializer_range=0.3,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    for module in list(model.modules()):  # those of transformers compute in float32
        for name, child in module.named_children():
            if type(child).__name__ == "LlamaRMSNorm":
                setattr(module, name, torch.nn.RMSNorm(WIDTH))
    torch.nn.Module.double(model).eval()
    return LanguageModel("tiny", None, None, model, None)


def batch() -> ContextBatch:
    """Contexts of two documents each, which do not see each other."""
    ids = np.random.default_rng(0).integers(0, 50, (3, 12))
    position = np.tile(np.concatenate([np.arange(5), np.arange(7)]), (3, 1))
    return ContextBatch("train", ids, np.zeros_like(ids), position, ids.astype(np.uint64), None,
                        TextPoint())  # fmt: skip


def tuned(config: CoderConfig, hook: str, seed: int = 0) -> TunedCoder:
    start = random_coder(config, seed)
    tensors = {n: t.double() for n, t in start.tensors.items()}
    if config.decoder_norm == "unit":
        tensors["W_dec"] /= tensors["W_dec"].norm(dim=1, keepdim=True)
        if config.amplitude == "learned":
            tensors["W_dec"] *= torch.rand(LATENTS, 1).double() + 0.5
        tensors["W_dec"] *= UNIT_Y
    # Margins that the surrogates see: neither far below their thresholds nor far above.
    near = {"gumbel": 0.2, "rectangle": 0.05}.get(config.surrogate)
    tensors["encoder.weight"] *= near or 3
    tensors["encoder.bias"] += 8.5 if near else 7
    coder = SparseCoder(config, tensors)
    surrogate = None if config.code == "continuous" else config.surrogate
    planned = FinetunedCoder(
        name=f"{hook}/{seed}", hookpoint=hook, coder=config, parent="a", parent_xxh3_128="",
        optimiser="adam", lr=1e-3, warmup=0.0, decay="none", clip_norm=None,
        surrogate="sigmoid" if surrogate == "gumbel" else surrogate,
    )  # fmt: skip
    zero = torch.zeros(WIDTH, dtype=torch.float64)
    x = UNIT_Y if config.site == "sae" else UNIT_X
    scale = Scale(x, UNIT_Y, zero, zero, VARIANCE)
    return TunedCoder(planned, coder, scale, FinetuneConfig(precision="fp32"), torch.device("cpu"))


def dense(coder: TunedCoder, p: dict[str, Tensor], x: Tensor) -> Tensor:
    """What the coder makes of rows in its own units, from the definitions alone."""
    config, planned = coder.planned.coder, coder.planned
    rows = x - p["b_dec"] if config.site == "sae" else x
    pre = rows @ p["encoder.weight"].T + p["encoder.bias"]
    margin = pre
    binary = torch.arange(LATENTS) >= config.first_binary
    if config.has_threshold:
        theta = p["log_threshold"].exp()
        margin = pre - torch.cat([theta.new_zeros(config.first_binary), theta])
    with torch.no_grad():  # which latents: as the coder selects, which has tests of its own
        code = coder.module.encode(x)
        chosen = torch.zeros_like(margin).scatter(1, code.latent, 1.0).bool()
        if config.select == "batch_topk":
            chosen &= margin >= coder.module.select_threshold.max()
    value = margin.relu()
    if config.code != "continuous":
        assert planned.surrogate is not None
        shift: Any = coder.module._shift(margin.detach(), code.latent)
        if shift.ndim:
            shift = torch.zeros_like(margin).scatter(1, code.latent, shift)
        at, t = margin.detach() + shift, coder.module.temperature
        slope = SURROGATES[planned.surrogate](torch.ones_like(at), at, t)
        on = torch.ones_like(at) if config.always_on else (at > 0).double()
        through = slope * (margin - margin.detach())
        if config.has_threshold and planned.surrogate != "sigmoid":
            # The authors' rule for thresholds: theta / T times what the chain rule gives.
            whole = torch.cat([theta.new_zeros(config.first_binary), theta])
            moved = whole - whole.detach()
            through = slope * (pre - pre.detach()) - slope * moved * whole.detach() / t
        value = torch.where(binary, on + through, value)
    code_NF = value * chosen
    y = code_NF @ p["W_dec"] + p["b_dec"]
    return y + x @ p["W_skip"].T if "W_skip" in p else y


def reference(
    lm: LanguageModel, coders: list[TunedCoder], loss: Loss
) -> tuple[float, float, list[dict[str, Tensor]]]:
    """KL, CE, and the gradients of each coder's tensors in its own units."""
    model, made = lm.model, batch()
    ids, position = torch.from_numpy(made.token_id), torch.from_numpy(made.position)
    with torch.no_grad():
        clean = model(input_ids=ids, position_ids=position, use_cache=False).logits.log_softmax(-1)
    leaves = [
        {n: t.clone().requires_grad_() for n, t in c.module.coder().tensors.items()} for c in coders
    ]
    errors: list[Tensor] = []
    handles = []
    for coder, p in zip(coders, leaves, strict=True):

        def replace(
            module: Any, args: Any, output: Tensor, c: TunedCoder = coder,
            p: dict[str, Tensor] = p,
        ) -> Tensor:  # fmt: skip
            x = output if c.planned.coder.site == "sae" else args[0]
            y_hat = dense(c, p, x.flatten(0, 1) / c.scale.x)
            errors.append((y_hat - output.detach().flatten(0, 1) / UNIT_Y).square().sum())
            return (y_hat * UNIT_Y).view_as(output)

        module = lm.base.get_submodule(coder.planned.hookpoint)
        handles.append(module.register_forward_hook(replace))
    spliced = model(input_ids=ids, position_ids=position, use_cache=False).logits.log_softmax(-1)
    for handle in handles:
        handle.remove()
    counted = position[:, 1:] != 0
    kl = torch.nn.functional.kl_div(spliced, clean, reduction="none", log_target=True).sum(-1)
    kl = kl[:, :-1][counted].mean()
    ce = torch.nn.functional.cross_entropy(spliced[:, :-1][counted], ids[:, 1:][counted])
    total = ce if loss == "ce" else kl
    if loss == "kl+fvu":
        for error in errors:
            fvu = error / (ids.numel() * VARIANCE)
            total = total + WEIGHT * fvu * (kl / fvu).detach() / len(errors)
    total.backward()
    found = [
        {n: t.grad if t.grad is not None else torch.zeros_like(t) for n, t in p.items()}
        for p in leaves
    ]
    return kl.item(), ce.item(), found


def expected(coder: TunedCoder, plain: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gradients of what is trained, from those of the coder's tensors."""
    config = coder.planned.coder
    wanted = {n: g for n, g in plain.items() if n != "select_threshold"}
    if config.threshold == "fixed":
        wanted.pop("log_threshold", None)
    if config.decoder_norm == "unit":
        g = wanted.pop("W_dec")
        rows = coder.module.W_dec.detach()
        lengths = rows.norm(dim=1, keepdim=True)
        along = (g * rows / lengths).sum(1, keepdim=True)
        if config.amplitude == "learned":
            wanted["parametrizations.W_dec.original0"] = along
        # Directions have length 1, and move across themselves alone.
        wanted["parametrizations.W_dec.original1"] = lengths * (g - along * rows / lengths)
    return wanted


def gradients(lm: LanguageModel, coders: list[TunedCoder], loss: Loss, micro: int = 3) -> list[Any]:
    """KL and CE of a step, and its gradients; the weights stay as they are."""
    stepper = Stepper(
        lm, [coders], loss=loss, fvu_weight=WEIGHT, packing="masked", separation=BY_POSITIONS,
        micro_contexts=micro,
    )  # fmt: skip
    for coder in coders:
        coder.optimiser.step = lambda lr: None  # type: ignore[method-assign] # gradients alone
    assert stepper.step(batch(), 0, 10) == []
    kl, ce = coders[0].progress.sums[:2]
    return [kl, ce, [dict(zip(c.parameters, c.gradients, strict=True)) for c in coders]]


def check(lm: LanguageModel, coders: list[TunedCoder], loss: Loss, micro: int = 3) -> None:
    kl, ce, plain = reference(lm, coders, loss)
    found = gradients(lm, coders, loss, micro)
    assert found[0] == pytest.approx(kl, rel=1e-9) and found[1] == pytest.approx(ce, rel=1e-9)
    assert kl > 0.01  # the coders do change what is predicted
    for coder, own, given in zip(coders, found[2], plain, strict=True):
        wanted = expected(coder, given)
        assert set(own) == set(wanted)
        for name, gradient in own.items():
            size = float(wanted[name].abs().max())
            assert size > 0, name
            torch.testing.assert_close(
                gradient,
                wanted[name],
                rtol=1e-7,
                atol=1e-9 * size,
                msg=f"the gradient of {name}",
            )


@pytest.mark.parametrize("kind", KINDS)
def test_of_every_kind_of_coder(lm: LanguageModel, kind: str) -> None:
    check(lm, [tuned(KINDS[kind], HOOKS[0])], "kl")


@pytest.mark.parametrize("loss", ["kl", "ce", "kl+fvu"])
@pytest.mark.parametrize("kind", ["skip_transcoder top-k", "sae binary, amplitudes"])
def test_of_every_loss(lm: LanguageModel, kind: str, loss: Loss) -> None:
    check(lm, [tuned(KINDS[kind], HOOKS[1])], loss)


@pytest.mark.parametrize("loss", ["kl", "kl+fvu"])
def test_of_coders_that_are_spliced_in_together(lm: LanguageModel, loss: Loss) -> None:
    """The first learns from what it does to the second, an SAE that reads what it left."""
    kinds = ("transcoder top-k", "sae binary")
    check(lm, [tuned(KINDS[k], h, i) for i, (k, h) in enumerate(zip(kinds, HOOKS, strict=True))],
          loss)  # fmt: skip


def test_some_contexts_at_a_time_give_the_gradients_of_all(lm: LanguageModel) -> None:
    check(lm, [tuned(KINDS["sae top-k"], HOOKS[0])], "kl", micro=2)


def test_nothing_of_the_model_has_a_gradient(lm: LanguageModel) -> None:
    lm.model.requires_grad_(True).zero_grad()
    gradients(lm, [tuned(KINDS["sae top-k"], HOOKS[0])], "kl")
    assert all(p.grad is None and not p.requires_grad for p in lm.model.parameters())

"""A coder from its definitions in docs/coders.md, dense and differentiable by autograd.

Straight-through gradients are autograd functions with the written definition as their derivative.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bsc.train.coders.config import CoderConfig


class Step(torch.autograd.Function):
    """1[m > 0] (or 1) whose derivative is that of a surrogate's written definition."""

    @staticmethod
    def forward(ctx, m: Tensor, config: CoderConfig) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(m)
        ctx.config = config
        return torch.ones_like(m) if config.always_on else (m > 0).to(m.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[no-untyped-def]
        (m,), t = ctx.saved_tensors, ctx.config.temperature
        s = torch.sigmoid(m / t)
        slope = {
            "sigmoid": s * (1 - s),
            "identity": torch.ones_like(m),
            "rectangle": ((m / t > -0.5) & (m / t < 0.5)).to(m.dtype),
            "re": m.abs() ** ((1 - t) / t) / t,
        }
        return grad * slope[ctx.config.surrogate], None


class Threshold(torch.autograd.Function):
    """exp(l), whose derivative for rectangle, identity and re is the authors': theta^2 / T."""

    @staticmethod
    def forward(ctx, log: Tensor, config: CoderConfig) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(log)
        ctx.config = config
        return log.exp()

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[no-untyped-def]
        theta = ctx.saved_tensors[0].exp()
        if ctx.config.surrogate == "sigmoid":
            return grad * theta, None
        return grad * theta * theta / ctx.config.temperature, None


def _apply(function: Any, *args: Any) -> Tensor:
    result: Tensor = function.apply(*args)
    return result


def chosen_latents(config: CoderConfig, margin: Tensor, factor: int = 1) -> Tensor:
    """1 at the selected latents, (N, F); factor: as if k were that many times as large."""
    n, n_latents = margin.shape
    border = config.first_binary if config.code == "hybrid" else n_latents
    k_binary = config.k_binary or 0
    chosen = torch.zeros_like(margin)
    for start, stop, k in ((0, border, config.k - k_binary), (border, n_latents, k_binary)):
        if stop == start:
            continue
        part, k = margin.detach()[:, start:stop], min(factor * k, stop - start)
        if config.select == "topk":
            mask = torch.zeros_like(part).scatter(1, part.topk(k, dim=1).indices, 1.0)
        elif config.select == "groupmax":
            groups = part.view(n, k, -1)
            mask = (groups == groups.amax(2, keepdim=True)).to(part.dtype).view_as(part)
        else:
            floor = part.flatten().sort(descending=True).values[n * k - 1]
            mask = (part >= floor).to(part.dtype)
        chosen[:, start:stop] = mask
    return chosen


def row_threshold(pre: Tensor, k: int) -> Tensor:
    """t with sum sigmoid(pre + t) = k in every row, (N, 1), by bisection."""
    low, high = -pre.amax(1, keepdim=True) - 50, -pre.amin(1, keepdim=True) + 50
    for _ in range(200):
        middle = (low + high) / 2
        above = torch.sigmoid(pre + middle).sum(1, keepdim=True) > k
        low, high = torch.where(above, low, middle), torch.where(above, middle, high)
    return (low + high) / 2


def code_of(config: CoderConfig, margin: Tensor, factor: int = 1) -> Tensor:
    """Code (N, F), differentiable."""
    if config.surrogate == "gumbel":
        groups = margin.view(len(margin), config.k, -1)
        support = groups.shape[2] if config.gumbel_support == "full" else min(4, groups.shape[2])
        floor = groups.topk(support, dim=2).values[:, :, -1:]
        soft = (groups / config.temperature).masked_fill(groups < floor, -torch.inf).softmax(2)
        hard = (groups == groups.amax(2, keepdim=True)).to(margin.dtype)
        return (hard - soft.detach() + soft).view_as(margin)
    is_binary = torch.arange(config.n_latents) >= config.first_binary
    shifted = margin
    if config.threshold == "newton":
        k = config.k if config.code == "binary" else config.k_binary
        assert k is not None
        shifted = margin + row_threshold(margin.detach()[:, config.first_binary :], k)
    value = torch.where(is_binary, _apply(Step, shifted, config), margin.relu())
    return value * chosen_latents(config, margin, factor)


def reference(
    config: CoderConfig,
    p: dict[str, Tensor],
    x: Tensor,
    y: Tensor,
    total_variance: float,
    dead: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Squared error, the whole loss and the code (N, F) from the definitions, differentiable."""
    margin = (x - p["b_dec"] if config.site == "sae" else x) @ p["encoder.weight"].T + p[
        "encoder.bias"
    ]
    true_margin = margin
    if config.has_threshold:
        binary = (torch.arange(config.n_latents) >= config.first_binary).to(margin.dtype)
        true_margin = margin - p["log_threshold"].exp() * binary
        margin = margin - _apply(Threshold, p["log_threshold"], config) * binary
    w_dec = p["W_dec"]
    if config.decoder_norm == "unit":
        w_dec = w_dec / w_dec.norm(dim=1, keepdim=True)
    if config.amplitude == "learned":
        w_dec = w_dec * p["amplitude"].unsqueeze(1)
    base = p["b_dec"] + (x @ p["W_skip"].T if config.site == "skip_transcoder" else 0)
    scale = 1 / (len(x) * total_variance)
    code = code_of(config, margin)
    residual = y - base - code @ w_dec
    loss = residual.square().sum() * scale
    whole = loss
    if config.multi_topk:
        whole = whole + (y - base - code_of(config, margin, 4) @ w_dec).square().sum() * scale / 8
    if dead is not None and config.auxk_alpha and dead.any():
        wanted = config.auxk_k or config.d_out // 2
        k = min(wanted, int(dead.sum()))
        ranked = margin.detach().masked_fill(~dead, -torch.inf)
        mask = torch.zeros_like(margin).scatter(1, ranked.topk(k, dim=1).indices, 1.0)
        again = (true_margin.relu() * mask) @ w_dec  # relu has a derivative of its own
        aux = (again - residual.detach()).square().sum() * scale
        whole = whole + config.auxk_alpha * (k / wanted) * aux
    if config.rate_penalty:
        on = (code.detach() != 0).to(margin.dtype)
        above = on.mean(0) > config.rate_cap
        whole = whole + config.rate_penalty * (margin * on * above).sum() / len(x)
    return loss, whole, code

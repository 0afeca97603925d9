"""Optimisers. Adam is torch's; schedule-free sign SGD is the paper's "Signum".

    y_t     = (1 - beta) z_t + beta x_t           where the gradient is taken, beta = 0.95
    z_{t+1} = z_t - lr sign(grad f(y_t))
    x_{t+1} = x_t + (z_{t+1} - x_t) / (t + 1)     the running mean of z: the model that is kept

The parameter holds y while it trains and x after `finish`. There is no momentum but the
interpolation, no warm-up and no decay.

Source: Defazio et al. 2024, arXiv:2405.15682 (schedule-free); Bernstein et al. 2018,
arXiv:1802.04434 (sign SGD). Equal step by step to `schedulefree.ScheduleFreeWrapper` around
sign SGD, which a test shows.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor

__all__ = ["OPTIMISERS", "Optimiser", "ScheduleFreeSignSGD", "default_lr", "make_optimiser"]

Optimiser = Literal["adam", "signum"]
OPTIMISERS: tuple[Optimiser, ...] = ("adam", "signum")


class ScheduleFreeSignSGD(torch.optim.Optimizer):
    """Sign SGD with schedule-free averaging; see the module's head for the rule."""

    def __init__(self, params: Iterable[Tensor], lr: float, beta: float = 0.95) -> None:
        """Take parameters at their first value.

        Args:
            params: leaf tensors.
            lr: change of every weight per step.
            beta: weight of the mean in the point where gradients are taken, above 0 to 1.
        """
        super().__init__(params, {"lr": lr, "beta": beta, "steps": 0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step from the gradients in `.grad`."""
        assert closure is None
        for group in self.param_groups:
            group["steps"] += 1
            beta, mean_weight = group["beta"], 1 / group["steps"]
            params = [p for p in group["params"] if p.grad is not None]
            for p in params:
                if not self.state[p]:
                    self.state[p]["z"] = p.detach().clone()
            z = [self.state[p]["z"] for p in params]
            torch._foreach_lerp_(params, z, 1 - 1 / beta)  # y -> x
            torch._foreach_sub_(z, [p.grad.sign() for p in params], alpha=group["lr"])
            torch._foreach_lerp_(params, z, mean_weight)
            torch._foreach_lerp_(params, z, 1 - beta)  # x -> y

    @torch.no_grad()
    def finish(self) -> None:
        """Replace the parameters by the averages x. No step may follow."""
        for group in self.param_groups:
            for p in group["params"]:
                if self.state[p]:
                    p.lerp_(self.state[p]["z"], 1 - 1 / group["beta"])


_BASE_LR = {
    ("adam", "continuous"): 3e-3,
    ("adam", "binary"): 1e-2,
    ("signum", "continuous"): 3e-3,
    ("signum", "binary"): 3e-3,
}
"""Learning rate at 2^14 latents: benchmarks/records/step_size_2core-epyc_2026-11-20.md."""


def default_lr(optimiser: Optimiser, code: str, n_latents: int) -> float:
    """Learning rate where none is given: base / sqrt(n_latents / 2^14)."""
    return _BASE_LR[optimiser, code] / float((n_latents / 2**14) ** 0.5)


def make_optimiser(name: Optimiser, params: list[Tensor], lr: float) -> torch.optim.Optimizer:
    """An optimiser over `params`, whose `.grad` are set."""
    if name == "adam":
        return torch.optim.Adam(params, lr=lr, fused=True)
    return ScheduleFreeSignSGD(params, lr=lr)

"""Straight-through gradients of a binary latent's step, as written definitions.

z = 1[m > 0] with m = pre - theta has no useful derivative, so the gradient g = dL/dz of a selected
latent goes on to m as `surrogate(g, m)`. T is the temperature. docs/coders.md has the table and the
sources; none of them reaches latents that were not selected.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["RE_FLOOR", "SURROGATES", "gumbel", "gumbel_noise", "threshold_factor"]

RE_FLOOR = 1e-4
"""Smallest |margin| that the surrogate `re` sees, which without it has no bound at 0."""


def sigmoid(grad: Tensor, margin: Tensor, temperature: float) -> Tensor:
    """g s (1 - s) with s = sigmoid(m / T); without the factor 1 / T of a true derivative."""
    s = torch.sigmoid(margin / temperature)
    return grad * s * (1 - s)


def identity(grad: Tensor, margin: Tensor, temperature: float) -> Tensor:
    """g."""
    return grad


def rectangle(grad: Tensor, margin: Tensor, temperature: float) -> Tensor:
    """g where |m / T| < 1/2, else 0."""
    return grad * ((margin / temperature).abs() < 0.5)


def re(grad: Tensor, margin: Tensor, temperature: float) -> Tensor:
    """g |m|^((1 - T) / T) / T, with |m| of at least `RE_FLOOR`; for T = 2, g / (2 sqrt |m|)."""
    power = (1 - temperature) / temperature
    return grad * margin.abs().clamp(min=RE_FLOOR).pow(power) / temperature


SURROGATES: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "sigmoid": sigmoid,
    "identity": identity,
    "rectangle": rectangle,
    "re": re,
}


def threshold_factor(surrogate: str, theta: Tensor, temperature: float) -> Tensor:
    """Factor from sum_n surrogate(g, m) to the gradient of log theta.

    sigmoid: -theta, the chain rule of m = pre - exp(log theta). rectangle, identity and re: the
    authors' code has dL/dtheta = -(theta / T) times the sum (compare Rajamanoharan et al. 2024,
    arXiv:2407.14435), hence -theta^2 / T. A true derivative to the margin, such as that of AuxK's
    relu(m), always has -theta.
    """
    return -theta if surrogate == "sigmoid" else -theta.square() / temperature


def gumbel(grad_Nkm: Tensor, perturbed_Nkm: Tensor, temperature: float) -> Tensor:
    """Gradient of the softmax of a group's candidates: s (g - sum s g) / T, s = softmax(h / T).

    The hard one-hot of the forward pass stands for the softmax straight through. h are the m
    largest perturbed pre-activations of a group, or all of them.
    """
    s = torch.softmax(perturbed_Nkm / temperature, dim=2)
    return s * (grad_Nkm - (s * grad_Nkm).sum(2, keepdim=True)) / temperature


def gumbel_noise(like: Tensor, generator: torch.Generator) -> Tensor:
    """Standard Gumbel noise, float32, of the shape of `like`: -log of an exponential."""
    drawn = torch.empty(like.shape, dtype=torch.float32, device=like.device)
    return drawn.exponential_(generator=generator).clamp_(min=1e-30).log_().neg_()

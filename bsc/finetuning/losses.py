"""What a spliced model's predictions cost, with the gradient to its logits.

KL:  sum over the vocabulary of p log(p / q), p of the model as it is, q of the spliced one; its
     gradient to the logits of q is q - p.
CE:  -log q of the next token; its gradient is q less 1 at that token.

Both are worked out together, some rows at a time, so that nothing but the logits and their gradient
is as large as (tokens, vocabulary).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from bsc.eval.passes.context_pass import slices

__all__ = ["Predictions", "clean_predictions", "prediction_loss"]


class Predictions(NamedTuple):
    """What the model as it is predicts, and what comes."""

    p: Tensor
    """(tokens, vocabulary) float32 or better, probabilities of the next token."""
    entropy: Tensor
    """(tokens,), of each of these in nats."""
    target: Tensor
    """(tokens,) int64, the next token."""
    weight: Tensor
    """(tokens,) float32: 1, and 0 of what is not predicted."""


def clean_predictions(logits: Tensor, target: Tensor, weight: Tensor) -> Predictions:
    """From the logits (tokens, vocabulary) of the model as it is."""
    wide = _wide(logits)
    p = torch.empty(logits.shape, dtype=wide, device=logits.device)
    entropy = torch.empty(len(logits), dtype=wide, device=logits.device)
    for here in slices(logits):
        log_p = torch.log_softmax(logits[here].to(wide), dim=-1)
        p[here] = log_p.exp()
        entropy[here] = -(p[here] * log_p).sum(-1)
    return Predictions(p, entropy, target, weight)


def _wide(logits: Tensor) -> torch.dtype:
    return torch.promote_types(logits.dtype, torch.float32)


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, clean: Predictions, kl: bool) -> tuple[Tensor, Tensor]:
        gradient = torch.empty_like(logits)
        wide = _wide(logits)
        sums = torch.zeros(2, dtype=wide, device=logits.device)
        for here in slices(logits):
            log_q = torch.log_softmax(logits[here].to(wide), dim=-1)
            p, target = clean.p[here], clean.target[here].unsqueeze(1)
            weight = clean.weight[here].to(wide)
            divergence = -clean.entropy[here] - torch.linalg.vecdot(p, log_q)
            nats = -log_q.gather(1, target).squeeze(1)
            sums += torch.stack([torch.dot(divergence, weight), torch.dot(nats, weight)])
            q = log_q.exp_()
            g = q.sub_(p) if kl else q.scatter_add_(1, target, -torch.ones_like(target).to(q))
            gradient[here] = g.mul_(weight.unsqueeze(1)).to(gradient.dtype)
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(sums)
        return sums[0 if kl else 1].clone(), sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        (gradient,) = ctx.saved_tensors
        return gradient * grads[0].to(gradient.dtype), None, None


def prediction_loss(logits: Tensor, clean: Predictions, *, kl: bool) -> tuple[Tensor, Tensor]:
    """The loss with its gradient, and both losses.

    Args:
        logits: (tokens, vocabulary) of the spliced model.
        clean: of the same tokens.
        kl: whether the loss is KL, else CE.

    Returns:
        The loss, and [KL, CE], sums of nats, float32 or better.
    """
    made: tuple[Tensor, Tensor] = _Loss.apply(logits, clean, kl)  # type: ignore[no-untyped-call] # torch leaves it untyped
    return made

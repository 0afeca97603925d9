from __future__ import annotations

import pytest
import schedulefree
import torch

from bsc.train.optim import ScheduleFreeSignSGD, make_optimiser
from bsc.train.trainer import adam_scale


class SignSGD(torch.optim.Optimizer):
    """The base optimiser that the reference wraps: minus lr times the sign of the gradient."""

    def __init__(self, params: list[torch.Tensor], lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: object = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                p.add_(p.grad.sign(), alpha=-group["lr"])


def gradient(p: torch.Tensor, step: int) -> torch.Tensor:
    """Of a quadratic with a target that moves, so that signs change."""
    target = torch.linspace(-1, 1, p.numel(), dtype=p.dtype).view_as(p) * (1 + (step % 5))
    return p.detach() - target


def test_signum_equals_the_schedulefree_package_step_by_step() -> None:
    start = torch.randn(7, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ours, theirs = (start.clone().requires_grad_() for _ in range(2))
    a = ScheduleFreeSignSGD([ours], lr=0.03, beta=0.95)
    b = schedulefree.ScheduleFreeWrapper(SignSGD([theirs], lr=0.03), momentum=0.95)
    b.train()
    for step in range(60):
        ours.grad, theirs.grad = gradient(ours, step), gradient(theirs, step)
        a.step()
        b.step()
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)
    a.finish()
    b.eval()
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", ["adam", "signum"])
def test_an_optimiser_reaches_a_minimum(name: str) -> None:
    p = torch.full((4,), 3.0, requires_grad=True)
    optimiser = make_optimiser(name, [p], lr=0.05)  # type: ignore[arg-type]
    for _ in range(400):
        p.grad = p.detach() - 1.0
        optimiser.step()
    if isinstance(optimiser, ScheduleFreeSignSGD):
        optimiser.finish()
    assert (p - 1).abs().max() < 0.3, p


def test_adam_works_on_slices_of_a_stack_and_leaves_the_others() -> None:
    stack, grads = torch.ones(3, 4), torch.ones(3, 4)
    part = stack[1].requires_grad_()
    part.grad = grads[1]
    make_optimiser("adam", [part], lr=0.1).step()
    assert torch.equal(stack[0], torch.ones(4)) and torch.equal(stack[2], torch.ones(4))
    torch.testing.assert_close(stack[1].detach(), torch.full((4,), 0.9))


def test_the_schedule_rises_then_falls_to_nearly_zero() -> None:
    scales = [adam_scale(s, 200) for s in range(200)]
    peak = scales.index(max(scales))
    assert max(scales) == 1.0 and peak == 9 and scales[-1] < 0.01
    assert sorted(scales[peak:], reverse=True) == scales[peak:]

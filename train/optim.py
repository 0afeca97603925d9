"""Optimisers of one coder, over its slices of a bank's stacked parameters.

adam            torch's, fused; betas 0.9, or as given, and 0.999; epsilon as given
signum          schedule-free sign SGD, what the paper's code calls Signum:
                    y_t     = (1 - beta) z_t + beta x_t           where the gradient is taken
                    z_{t+1} = z_t - lr sign(grad f(y_t))          beta = 0.95
                    x_{t+1} = x_t + (z_{t+1} - x_t) / (t + 1)     mean of z: the model that is kept
                The parameter holds y while it trains and x after `finish`. No momentum but the
                interpolation.
signum_classic  m = beta m + (1 - beta) grad;  w = w - lr sign(m), beta = 0.9
muon            torch's for matrices, its step scaled to the size of Adam's; Adam for vectors

Sources: Kingma and Ba 2015, arXiv:1412.6980 (Adam); Defazio et al. 2024, arXiv:2405.15682
(schedule-free); Bernstein et al. 2018, arXiv:1802.04434 (sign SGD, Signum); Jordan et al. 2024 and
Liu et al. 2025, arXiv:2502.16982 (Muon and its scale). Tests hold each to its reference step by
step.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from bsc.errors import ConfigError
from bsc.train.config import Optimiser

__all__ = [
    "ClassicSignum",
    "CoderOptimiser",
    "ScheduleFreeSignSGD",
    "adam_eps",
    "state_bytes",
]

_ADAM_EPS = 1e-6


def adam_eps(rows: int, total_variance: float) -> float:
    """Epsilon of Adam for a loss that is a squared error over `rows * total_variance`.

    Gradients of that loss fall as 1 / (rows * total variance), so that with torch's 1e-8 weights
    step less the larger batch and module are, first of all those of latents that fire rarely. With
    this one a step does not depend on the unit of the loss.

    >>> adam_eps(2048, 192.0) / adam_eps(65536, 4096.0)
    682.6666666666666
    """
    return _ADAM_EPS / (rows * total_variance)


class ScheduleFreeSignSGD(torch.optim.Optimizer):
    """Sign SGD with schedule-free averaging; see the module's head for the rule."""

    def __init__(self, params: Iterable[Tensor], lr: float, beta: float = 0.95) -> None:
        """Take parameters at their first value.

        Args:
            params: leaf tensors.
            lr: change of every weight per step.
            beta: weight of the mean in the point where gradients are taken, above 0 to 1.
        """
        super().__init__(params, {"lr": lr, "beta": beta})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step from the gradients in `.grad`, which are replaced by their signs."""
        assert closure is None
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            for p in params:
                if not self.state[p]:
                    self.state[p] = {"step": torch.zeros(()), "z": p.detach().clone()}
                self.state[p]["step"] += 1
            if not params:
                continue
            beta, mean_weight = group["beta"], 1 / float(self.state[params[0]]["step"])
            z = [self.state[p]["z"] for p in params]
            # With x put in from y and z: y' = y + c (z - y) - lr (1 - beta (1 - c)) sign, where c
            # is the weight of z' in the mean. Three passes instead of five.
            signs = [p.grad for p in params]
            torch._foreach_sign_(signs)
            torch._foreach_lerp_(params, z, mean_weight)
            lr = group["lr"]
            torch._foreach_add_(params, signs, alpha=-lr * (1 - beta * (1 - mean_weight)))
            torch._foreach_add_(z, signs, alpha=-lr)

    @torch.no_grad()
    def finish(self) -> None:
        """Replace the parameters by the averages x. No step may follow."""
        for group in self.param_groups:
            for p in group["params"]:
                if self.state[p]:
                    p.lerp_(self.state[p]["z"], 1 - 1 / group["beta"])


class ClassicSignum(torch.optim.Optimizer):
    """Sign of the momentum; see the module's head for the rule."""

    def __init__(self, params: Iterable[Tensor], lr: float, beta: float = 0.9) -> None:
        """Take parameters, the change of every weight per step and the memory of the momentum."""
        super().__init__(params, {"lr": lr, "beta": beta})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step from the gradients in `.grad`."""
        assert closure is None
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            for p in params:
                if not self.state[p]:
                    self.state[p] = {"momentum": torch.zeros_like(p)}
            momenta = [self.state[p]["momentum"] for p in params]
            torch._foreach_lerp_(momenta, [p.grad for p in params], 1 - group["beta"])
            torch._foreach_sub_(params, [m.sign() for m in momenta], alpha=group["lr"])


def _make(
    name: Optimiser, tensors: list[Tensor], lr: float, beta1: float, eps: float
) -> list[torch.optim.Optimizer]:
    adam: dict[str, Any] = {"lr": lr, "betas": (beta1, 0.999), "eps": eps, "fused": True}
    if name == "signum":
        return [ScheduleFreeSignSGD(tensors, lr)]
    if name == "signum_classic":
        return [ClassicSignum(tensors, lr)]
    if name == "adam":
        return [torch.optim.Adam(tensors, **adam)]
    muon = getattr(torch.optim, "Muon", None)
    if muon is None:
        raise ConfigError(
            f"optimiser='muon' needs torch 2.9 or later, here is {torch.__version__}."
        )
    matrices = [t for t in tensors if t.ndim == 2]
    vectors = [t for t in tensors if t.ndim != 2]
    parts: list[torch.optim.Optimizer] = []
    if matrices:
        parts.append(muon(matrices, lr=lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"))
    if vectors:
        parts.append(torch.optim.Adam(vectors, **adam))
    return parts


class CoderOptimiser:
    """One coder's optimiser: clipping, the step, averages, and a state of named tensors."""

    def __init__(
        self,
        name: Optimiser,
        tensors: Mapping[str, tuple[Tensor, Tensor]],
        lr: float,
        clip_norm: float | None = None,
        beta1: float = 0.9,
        eps: float = 1e-8,
    ) -> None:
        """Take parameters and their gradients, which it reads at every step.

        Args:
            name: which optimiser.
            tensors: parameter and gradient by name.
            lr: learning rate of the first step.
            clip_norm: length to which all gradients of the coder together are cut; None: any.
            beta1: of Adam.
            eps: of Adam.
        """
        self.parameters: dict[str, Tensor] = {}
        for key, (parameter, gradient) in tensors.items():
            parameter.requires_grad_()
            parameter.grad = gradient
            self.parameters[key] = parameter
        self.clip_norm = clip_norm
        self._parts = _make(name, list(self.parameters.values()), lr, beta1, eps)

    def step(self, lr: float) -> None:
        """One step with this learning rate."""
        if self.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.parameters.values(), self.clip_norm)
        for part in self._parts:
            for group in part.param_groups:
                group["lr"] = lr
            part.step()

    @torch.no_grad()
    def rescale(self, name: str, lengths: Tensor) -> None:
        """Follow a parameter whose rows were divided by `lengths`, (rows, 1).

        What schedule-free keeps beside the parameter is divided too, so that the average, which
        is worked out from both, is that of the divided rows.
        """
        for part in self._parts:
            if isinstance(part, ScheduleFreeSignSGD):
                part.state[self.parameters[name]]["z"] /= lengths

    @torch.no_grad()
    def finish(self) -> None:
        """Put the weights that are kept into the parameters. No step may follow."""
        for part in self._parts:
            if isinstance(part, ScheduleFreeSignSGD):
                part.finish()

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The weights that would be kept stand in the parameters while the block runs."""
        if not isinstance(self._parts[0], ScheduleFreeSignSGD):
            yield
            return
        before = [p.detach().clone() for p in self.parameters.values()]
        self.finish()
        try:
            yield
        finally:
            with torch.no_grad():
                for p, value in zip(self.parameters.values(), before, strict=True):
                    p.copy_(value)

    def state(self) -> dict[str, Tensor]:
        """Its state: tensors by the name of the parameter and of what is kept for it."""
        return {
            f"{name}/{key}": value
            for name, p in self.parameters.items()
            for part in self._parts
            if p in part.state
            for key, value in part.state[p].items()
        }

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on from copies of what `state` gave; without any tensors, from the beginning."""
        for name, p in self.parameters.items():
            mine = {k.rsplit("/", 1)[1]: v for k, v in state.items() if k.rsplit("/", 1)[0] == name}
            for part in self._parts:
                if mine and any(p is q for g in part.param_groups for q in g["params"]):
                    # Counters of steps live on the CPU unless the optimiser is fused on a GPU.
                    part.state[p] = {
                        k: v.to(p.device if v.ndim or k == "step" else v.device, copy=True)
                        for k, v in mine.items()
                    }


def state_bytes(name: Optimiser, tensors: Mapping[str, tuple[int, ...]]) -> int:
    """Bytes that the state of an optimiser takes, given the shapes of float32 parameters."""
    total = 0
    for shape in tensors.values():
        copies = 2 if name == "adam" or (name == "muon" and len(shape) != 2) else 1
        total += 4 * copies * torch.Size(shape).numel()
    return total

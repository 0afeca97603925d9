"""One coder that is finetuned: its module, optimiser, counters and state."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bsc.devices import product_dtype
from bsc.eval.passes.splice import Replacement
from bsc.finetuning.config import FinetuneConfig
from bsc.train.coders.coder import Code, SparseCoder
from bsc.train.coders.module import CoderModule
from bsc.train.optim import CoderOptimiser
from bsc.train.run_config import FinetunedCoder
from bsc.train.schedule import lr_scale
from bsc.train.training_rows import Scale

__all__ = ["FIGURES", "Progress", "TunedCoder"]

FIGURES = ("kl", "ce", "fvu", "l0")
"""Means of a step, in the order of `Progress.sums`."""
_DIRECTION = "parametrizations.W_dec.original1"


@dataclass
class Progress:
    """How far a coder is, beside its tensors. Goes into the checkpoint."""

    frozen_at: int | None = None
    """Step at which it turned non-finite and was left as it was."""
    tokens: int = 0
    """That it was finetuned on."""
    sums: list[float] = field(default_factory=lambda: [0.0] * (len(FIGURES) + 1))
    """Sums of the figures over steps, and number of steps, since the last line of metrics."""
    last: list[float] = field(default_factory=lambda: [0.0, 0.0])
    """KL and FVU of the step before: what `kl+fvu` is balanced by. 0: there was none."""
    lr: float = 0.0
    """Learning rate of the last step."""


class TunedCoder:
    """A coder in finetuning. Computes in units in which the rows of the module have an rms of 1."""

    def __init__(
        self,
        planned: FinetunedCoder,
        coder: SparseCoder,
        scale: Scale,
        config: FinetuneConfig,
        device: torch.device,
    ) -> None:
        """Take a copy of a coder.

        Args:
            planned: what is to become of it.
            coder: as it was trained, in the units of the module.
            scale: units that it is finetuned in.
            config: of the run.
            device: where.
        """
        self.planned, self.scale = planned, scale
        rounded = product_dtype(config.precision, device)
        self.about = dict(coder.about)
        self.module = CoderModule(
            coder.in_units(x=1 / scale.x, y=1 / scale.y).to(device),
            planned.surrogate,
            compute_dtype=None if rounded == torch.float32 else rounded,
        )
        self.module.hold_row_lengths()
        fixed = planned.coder.threshold == "fixed"
        self.parameters = {
            name: parameter
            for name, parameter in self.module.named_parameters()
            if parameter.requires_grad and not (fixed and name == "log_threshold")
        }
        for name, parameter in self.module.named_parameters():
            parameter.requires_grad_(name in self.parameters)
        self.gradients = [torch.zeros_like(p) for p in self.parameters.values()]
        self.optimiser = CoderOptimiser(
            planned.optimiser,
            dict(
                zip(
                    self.parameters,
                    zip(self.parameters.values(), self.gradients, strict=True),
                    strict=True,
                )
            ),
            planned.lr,
            planned.clip_norm,
            planned.beta1,
        )
        self.progress = Progress()
        latents = planned.coder.n_latents
        self.last_fired = torch.zeros(latents, dtype=torch.int64, device=device)
        """Tokens that it had seen when a latent last fired."""
        self.fired = torch.zeros(latents, dtype=torch.bool, device=device)
        """In this step."""
        self.figures = torch.zeros(3, dtype=torch.float64, device=device)
        """Sums over the rows of this step: squared errors over the total variance, latents that
        fire, rows."""
        self.error: Tensor | None = None
        """Squared errors over the total variance of the last pass, with a gradient; rows that are
        left as they are do not count."""
        self.rows: Tensor | None = None
        """How many do, in the last pass."""

    def replacement(self, kept: Tensor | None) -> Replacement:
        """What to splice in: keeps figures and the error of what passes.

        Args:
            kept: (tokens,) bool, rows that are left as they are; None: none.
        """

        def replace(x: Tensor, y: Tensor) -> Tensor:
            rows = y if self.planned.coder.site == "sae" else x
            used = x.isfinite().all(dim=1) & y.isfinite().all(dim=1)
            if kept is not None:
                used &= ~kept
            # What is not used must not reach a gradient, in which 0 times infinity is not 0.
            own = self.module.encoder.weight.dtype
            rows = rows.to(own).masked_fill(~used.unsqueeze(1), 0) / self.scale.x
            y_hat, code = self.module.reconstruct(rows)
            target = y.detach().to(own) / self.scale.y
            error = (y_hat - target).masked_fill(~used.unsqueeze(1), 0).square().sum()
            self.error, self.rows = error / self.scale.variance_y, used.sum()
            self._count(code, used)
            return y_hat * self.scale.y

        return replace

    @torch.no_grad()
    def _count(self, code: Code, used: Tensor) -> None:
        assert self.error is not None
        on = (code.value != 0) & used.unsqueeze(1)
        # One more place for what does not count, which needs no read of the device.
        marks = torch.zeros(len(self.fired) + 1, dtype=torch.bool, device=on.device)
        marks[torch.where(on, code.latent, len(self.fired)).flatten()] = True
        self.fired |= marks[:-1]
        self.figures += torch.stack([self.error.double(), on.sum().double(), used.sum().double()])

    @torch.no_grad()
    def begin(self) -> None:
        """Empty what a step adds to."""
        torch._foreach_zero_(self.gradients)
        self.fired.zero_()
        self.figures.zero_()

    @torch.no_grad()
    def finite(self, predicted: int) -> Tensor:
        """Divide the gradients by the predicted tokens of the step, and tell whether all are
        finite, a bool on the device."""
        torch._foreach_div_(self.gradients, float(predicted))
        return torch.stack([g.sum() for g in self.gradients]).sum().isfinite()

    def step(self, step: int, steps: int, tokens: int) -> None:
        """Change the weights by the gradients of a step, of `tokens` tokens."""
        plan, progress = self.planned, self.progress
        progress.tokens += tokens
        progress.lr = plan.lr * lr_scale(step, steps, plan.warmup, plan.decay)
        self.optimiser.step(progress.lr)
        lengths = self.module.renormalise()
        if lengths is not None:
            self.optimiser.rescale(_DIRECTION, lengths)
        self.last_fired.masked_fill_(self.fired, progress.tokens)

    def dead(self, after: int) -> float:
        """Share of latents that did not fire in the last `after` tokens, or ever if fewer were
        seen."""
        silent = self.progress.tokens - self.last_fired
        return float((silent >= max(1, min(after, self.progress.tokens))).double().mean())

    def state(self) -> dict[str, Tensor]:
        """Every tensor that decides how it goes on, by name."""
        tensors = {f"parameters/{n}": p.detach() for n, p in self.module.state_dict().items()}
        tensors |= {f"optimiser/{n}": t for n, t in self.optimiser.state().items()}
        return tensors | {"last_fired": self.last_fired}

    @torch.no_grad()
    def load_state(self, tensors: Mapping[str, Tensor], progress: Progress) -> None:
        """Go to where `state` was taken."""
        own = self.module.state_dict()
        for name, tensor in own.items():
            tensor.copy_(tensors[f"parameters/{name}"])
        prefix = "optimiser/"
        self.optimiser.load_state(
            {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
        )
        self.last_fired.copy_(tensors["last_fired"])
        self.progress = progress

    @torch.no_grad()
    def finish(self, facts: Mapping[str, Any], step: int) -> SparseCoder:
        """The finetuned coder in the units of the module, after `step` steps."""
        self.optimiser.finish()
        coder = self.module.coder().to("cpu").in_units(x=self.scale.x, y=self.scale.y)
        if not all(t.isfinite().all() for t in coder.tensors.values()):
            self.progress.frozen_at = (
                step if self.progress.frozen_at is None else (self.progress.frozen_at)
            )
        about = {k: v for k, v in self.about.items() if k != "imported"}  # of other weights
        coder.about = about | {
            "name": self.planned.name,
            "optimiser": self.planned.optimiser,
            "lr": self.planned.lr,
            "finetuned_on": self.progress.tokens,
            "frozen_at_step": self.progress.frozen_at,
            "stopped_at_step": None,
            **facts,
        }
        return coder

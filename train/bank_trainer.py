"""A bank in training: its coders' optimisers, schedules, counters and state."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import isfinite
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bsc.cache.store.split import Moments
from bsc.cache.store.store import ActivationStore
from bsc.devices import product_dtype
from bsc.errors import UserError
from bsc.train.coders.bank import Bank, StepResult
from bsc.train.coders.coder import SparseCoder
from bsc.train.config import TrainConfig
from bsc.train.memory import EVALUATION_ROWS
from bsc.train.optim import CoderOptimiser, adam_eps
from bsc.train.run_config import PlannedCoder
from bsc.train.schedule import annealed, lr_scale
from bsc.train.team import ALONE, Team
from bsc.train.training_rows import Scale, measure_moments

__all__ = ["BankTrainer", "HeldOut", "Progress", "check_compiler"]

_IMPROVEMENT = 0.999
"""A held-out FVU below this share of the best so far is an improvement."""


def check_compiler(device: torch.device) -> None:
    """See that torch.compile works at all.

    On a function of its own: what `Bank` compiles is made for the sizes that it is first called
    with, and would stay made for those of a trial.

    Raises:
        UserError: it does not work here.
    """
    try:
        torch.compile(_doubled)(torch.ones(4, device=device))
    except Exception as error:  # whatever a compiler's absence or a strange path makes of it
        lines = [line for line in str(error).splitlines() if line.strip()] or [repr(error)]
        raise UserError(
            f"--compile: torch.compile does not work here ({lines[0]}). It needs a C++ compiler, "
            f"and an installation whose path has no blanks. Leave the flag out."
        ) from None


def _doubled(x: Tensor) -> Tensor:
    return x + x


@dataclass
class Progress:
    """How far a coder is, beside its tensors. Goes into the checkpoint."""

    first_step: int = 0
    """Step of the run at which it began; above 0 for a coder that was added later."""
    frozen_at: int | None = None
    """Step at which it turned non-finite and was left as it was."""
    stopped_at: int | None = None
    """Step after which its held-out FVU no longer fell."""
    best: float | None = None
    """Lowest held-out FVU."""
    waited: int = 0
    """Held-out evaluations since then."""
    rows: int = 0
    """Rows that it was trained on."""
    sums: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])
    """Sums of loss and of L0, and number of steps, since the last line of metrics."""
    lr: float = 0.0
    """Learning rate of the last step."""

    @property
    def active(self) -> bool:
        """Whether it still trains."""
        return self.frozen_at is None and self.stopped_at is None


class HeldOut(NamedTuple):
    """Figures of a coder on held-out rows."""

    fvu: float
    l0: float


class BankTrainer:
    """A bank with its optimisers and counters."""

    def __init__(
        self,
        coders: list[PlannedCoder],
        store: ActivationStore,
        config: TrainConfig,
        device: torch.device,
        micro_rows: int,
        moments: Mapping[str, Moments] | None = None,
        team: Team = ALONE,
    ) -> None:
        """Make the bank and give its coders their first weights.

        Args:
            coders: of one hookpoint, site and number of latents.
            store: that they are trained on.
            config: of the run.
            device: where they are.
            micro_rows: rows that are worked on at a time.
            moments: of the rows, by array; None: of the store.
            team: processes that share its rows.

        Raises:
            ConfigError: the rows are all the same.
        """
        self.coders, self.device, self.micro_rows = coders, device, micro_rows
        self.dead_after, self.team = config.dead_after, team
        hook, first = coders[0].hookpoint, coders[0].coder
        self.x_name, self.y_name = f"{hook}/{first.side}", f"{hook}/output"
        if moments is None:
            moments = measure_moments(store, config, (self.x_name, self.y_name))
        self.scale = Scale.of(hook, moments[self.x_name], moments[self.y_name], config.normalise)
        if config.compile:
            check_compiler(device)
        self.bank = Bank(
            [c.coder for c in coders],
            total_variance=self.scale.variance_y,
            compute_dtype=product_dtype(config.precision, device),
            device=device,
            units=(self.scale.x, self.scale.y),
            compiled=config.compile,
        )
        self.bank.initialise([c.seed for c in coders], self.scale.mean_x, self.scale.mean_y)
        eps = adam_eps(config.batch_rows, self.scale.variance_y)
        self.optimisers = [
            CoderOptimiser(
                c.optimiser, self.bank.trained(i), c.lr, c.clip_norm, eps=c.adam_eps or eps
            )
            for i, c in enumerate(coders)
        ]
        n = len(coders)
        self.progress = [Progress() for _ in coders]
        self.last_fired = torch.zeros((n, self.bank.n_latents), dtype=torch.int64, device=device)
        """Rows that each coder had seen when a latent last fired."""
        self._rows = torch.zeros(n, dtype=torch.int64, device=device)
        """`Progress.rows` of each, for the device."""
        self._aux = any(c.coder.auxk_alpha > 0 for c in coders)
        self._noisy = any(c.coder.surrogate == "gumbel" for c in coders)
        if self._noisy:
            self.bank.generators = [torch.Generator(device=device) for _ in coders]

    def step(
        self, batch: Mapping[str, Tensor], step: int, steps: int, of_rows: int | None = None
    ) -> list[str]:
        """Train every coder that is still active on one batch.

        Args:
            batch: rows by array, bfloat16; of a team this process's part of them.
            step: of the run, from 0.
            steps: of the run.
            of_rows: rows of the whole batch; None: these.

        Returns:
            Names of coders that turned non-finite at this step.
        """
        active = [c for c, p in enumerate(self.progress) if p.active]
        if not active:
            return []
        y = batch[self.y_name].to(self.device, non_blocking=True)
        x = y
        if self.x_name != self.y_name:
            x = batch[self.x_name].to(self.device, non_blocking=True)
        self._schedule(active, step, steps)
        rows_taken = of_rows or len(x)
        result = self.bank.step(x, y, micro_rows=self.micro_rows, active=active, of_rows=rows_taken)
        if self.team.size > 1:
            result = self._add_up(result)
        # What waits for the device stands together, before the optimisers are started: what the
        # device has to know of the host, and all that the host has to know of a step, read at once.
        after = [p.rows + rows_taken if p.active else -1 for p in self.progress]
        seen = torch.tensor(after, device=self.device)
        finite = self._finite(result.loss) & (seen >= 0)
        self._rows = seen.where(finite, self._rows)
        fired = result.fired & finite.unsqueeze(1)
        self.last_fired = self._rows.unsqueeze(1).where(fired, self.last_fired)
        losses, l0s, right = torch.stack([result.loss, result.l0, finite.double()]).tolist()
        frozen = []
        for c in active:
            coder, progress, loss, l0 = self.coders[c], self.progress[c], losses[c], l0s[c]
            if not right[c]:
                progress.frozen_at = step
                frozen.append(coder.name)
                continue
            progress.rows = after[c]
            progress.sums = [s + v for s, v in zip(progress.sums, (loss, l0, 1.0), strict=True)]
            own, whole = step - progress.first_step, steps - progress.first_step
            progress.lr = coder.lr * lr_scale(own, whole, coder.warmup, coder.decay)
            self.optimisers[c].step(progress.lr)
            lengths = self.bank.renormalise(c)
            if lengths is not None:
                self.optimisers[c].rescale("W_dec", lengths)
        return frozen

    def _add_up(self, result: StepResult) -> StepResult:
        """Sum what the processes of the team found in their rows."""
        figures, fired = torch.stack([result.loss, result.l0]), result.fired.to(torch.uint8)
        self.team.add_up(*self.bank.gradients.values(), self.bank.select_minimum, figures)
        self.bank.select_minimum /= self.team.size
        self.team.largest(fired)
        return StepResult(figures[0], figures[1], fired > 0)

    def _schedule(self, active: list[int], step: int, steps: int) -> None:
        """Set what changes over a run: k, temperature, dead latents, the seed of noise."""
        for c in active:
            coder, progress = self.coders[c], self.progress[c]
            own, whole = step - progress.first_step, steps - progress.first_step
            config = coder.coder
            self.bank.k[c] = round(annealed(coder.k_init, config.k, own, whole, coder.anneal))
            self.bank.temperature[c] = annealed(
                coder.temperature_init, config.temperature, own, whole, coder.anneal
            )
            if self.bank.generators is not None:
                # Of (seed, step) alone, so that a resumed run draws what it would have drawn.
                noise = coder.seed * 0x9E3779B1 + step + (self.team.place << 40)
                self.bank.generators[c].manual_seed(noise % 2**63)
        if self._aux:
            self.bank.dead = self._silent_rows() >= self.dead_after
            if self.device.type == "cuda":  # once for all coders and pieces of the batch
                self.bank.n_dead = self.bank.dead.sum(dim=1).tolist()

    def _silent_rows(self) -> Tensor:
        """(C, F): rows of its coder since a latent last fired."""
        return self._rows.unsqueeze(1) - self.last_fired

    def _finite(self, loss: Tensor) -> Tensor:
        """Which coders have a finite loss and finite gradients, (C,) bool.

        A value that is not finite anywhere in a row, a code or a gradient of the decoder shows in
        the loss, or in the gradients of the biases, which sum over all rows.
        """
        finite = loss.isfinite()
        for gradient in self.bank.gradients.values():
            if gradient.ndim == 2:
                finite &= gradient.sum(dim=1).isfinite()
        return finite

    def take_metrics(self) -> list[dict[str, Any]]:
        """Means since the last call, one line per coder that trains."""
        # In a run shorter than dead_after: what never fired.
        after = [max(1, min(self.dead_after, p.rows)) for p in self.progress]
        silent = self._silent_rows() >= torch.tensor(after, device=self.device).unsqueeze(1)
        shares = silent.double().mean(dim=1).tolist()
        lines = []
        for coder, progress, dead in zip(self.coders, self.progress, shares, strict=True):
            loss, l0, steps = progress.sums
            progress.sums = [0.0, 0.0, 0.0]
            if progress.active and steps:
                lines.append(
                    {
                        "coder": coder.name,
                        "fvu": loss / steps,
                        "l0": l0 / steps,
                        "dead": dead,
                        "lr": progress.lr,
                    }
                )
        return lines

    @torch.no_grad()
    def held_out(self, rows: Mapping[str, Tensor]) -> dict[int, HeldOut]:
        """Figures of every active coder, as it would be saved now, by its place in the bank.

        Args:
            rows: held-out ones by array; the same every time.
        """
        x = rows[self.x_name].to(self.device).float() / self.scale.x
        y = rows[self.y_name].to(self.device).float() / self.scale.y
        total = float((y - y.mean(0)).square().sum())
        if total == 0:  # one row, or all the same
            return {}
        found = {}
        for c, progress in enumerate(self.progress):
            if not progress.active:
                continue
            with self.optimisers[c].averaged():
                exported = self.bank.export(c)
            error = on = 0.0
            for at in range(0, len(x), EVALUATION_ROWS):
                part = slice(at, at + EVALUATION_ROWS)
                code = exported.encode(x[part])
                error += float((exported.decode(code, x[part]) - y[part]).square().sum())
                on += float((code.value != 0).sum())
            found[c] = HeldOut(error / total, on / len(x))
        return found

    def stop_or_freeze(self, found: Mapping[int, HeldOut], step: int) -> None:
        """Freeze coders whose held-out FVU is not finite; stop those whose patience is over.

        Args:
            found: held-out figures after this step.
            step: of the run.
        """
        for c, figures in found.items():
            coder, progress = self.coders[c], self.progress[c]
            if not isfinite(figures.fvu):
                progress.frozen_at = step
            elif progress.best is None or figures.fvu < _IMPROVEMENT * progress.best:
                progress.best, progress.waited = figures.fvu, 0
            else:
                progress.waited += 1
                if coder.patience is not None and progress.waited >= coder.patience:
                    progress.stopped_at = step

    def state(self, c: int) -> dict[str, Tensor]:
        """Every tensor that decides how coder `c` goes on, by name."""
        tensors = {f"parameters/{n}": t[c] for n, t in self.bank.parameters.items()}
        tensors |= {f"optimiser/{n}": t for n, t in self.optimisers[c].state().items()}
        tensors["last_fired"] = self.last_fired[c]
        tensors["select_minimum"] = self.bank.select_minimum[c]
        return {n: t.detach() for n, t in tensors.items()}

    @torch.no_grad()
    def load_state(self, c: int, tensors: Mapping[str, Tensor], progress: Progress) -> None:
        """Put coder `c` where `state` was taken."""
        for name, stacked in self.bank.parameters.items():
            if f"parameters/{name}" in tensors:  # what another coder of the bank needs may be new
                stacked[c].copy_(tensors[f"parameters/{name}"])
        prefix = "optimiser/"
        self.optimisers[c].load_state(
            {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
        )
        self.last_fired[c].copy_(tensors["last_fired"])
        self.bank.select_minimum[c].copy_(tensors["select_minimum"])
        self.progress[c], self._rows[c] = progress, progress.rows

    def finish(self, about: dict[str, Any], step: int) -> Iterator[SparseCoder]:
        """The trained coders in the units of the store, after `step` steps, on the CPU.

        One at a time, so that memory does not have to hold them all once more.
        """
        for c, (coder, progress) in enumerate(zip(self.coders, self.progress, strict=True)):
            self.optimisers[c].finish()
            exported = self.bank.export(c)
            if not all(t.isfinite().all() for t in exported.tensors.values()):
                progress.frozen_at = step if progress.frozen_at is None else progress.frozen_at
            facts = about | {
                "name": coder.name,
                "hookpoint": coder.hookpoint,
                "optimiser": coder.optimiser,
                "lr": coder.lr,
                "seed": coder.seed,
                "rows": progress.rows,
                "frozen_at_step": progress.frozen_at,
                "stopped_at_step": progress.stopped_at,
            }
            exported.about.update(facts)
            trained = exported.to("cpu").in_units(x=self.scale.x, y=self.scale.y)
            del exported
            yield trained
            del trained

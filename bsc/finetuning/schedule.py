"""Learning rates of finetuning."""

from __future__ import annotations

from typing import NamedTuple

from bsc.errors import ConfigError
from bsc.finetuning.config import FinetuneConfig
from bsc.train.config import Decay
from bsc.train.schedule import default_decay, default_warmup

__all__ = ["Schedule", "schedule_of"]

_LR = {
    ("adam", "continuous"): 2e-3,
    ("adam", "binary"): 3e-3,
}
"""Learning rates for rows in units of rms:
benchmarks/records/finetune_2core-epyc-avx2_2026-11-23.md."""
_BETA1 = 0.7
"""Of Adam. The mean of torch's 0.9 remembers too long for so few steps."""
_PAPER_LR, _PAPER_WARMUP, _PAPER_BETA1 = 1e-3, 50, 0.9


class Schedule(NamedTuple):
    """Learning rate of a coder over a run, and what Adam remembers."""

    lr: float
    warmup: float
    """Share of the steps."""
    decay: Decay
    beta1: float


def schedule_of(config: FinetuneConfig, code: str, steps: int) -> Schedule:
    """Learning rate, warm-up, decay and Adam's beta1 of a coder.

    Args:
        config: of the run.
        code: of the coder; hybrids take the learning rate of continuous coders.
        steps: of the run.

    Raises:
        ConfigError: nothing was measured or published for this optimiser.
    """
    warmup = default_warmup(config.optimiser) if config.warmup is None else config.warmup
    decay = config.decay or default_decay(config.optimiser)
    beta1 = _PAPER_BETA1 if config.lr == "paper" else _BETA1
    beta1 = beta1 if config.beta1 is None else config.beta1
    if config.lr == "paper":
        if config.optimiser != "adam":
            raise ConfigError(
                f"--lr paper: the authors finetuned with adam, not {config.optimiser}. Give a "
                f"number."
            )
        if config.warmup is None:
            warmup = min(1.0, _PAPER_WARMUP / steps)
        return Schedule(_PAPER_LR, warmup, decay, beta1)
    if config.lr is not None:
        return Schedule(config.lr, warmup, decay, beta1)
    kind = "binary" if code == "binary" else "continuous"
    if (config.optimiser, kind) not in _LR:
        known = ", ".join(sorted({name for name, _ in _LR}))
        raise ConfigError(
            f"--optimiser {config.optimiser}: no learning rate was measured for it; give --lr. "
            f"Without one: {known}."
        )
    return Schedule(_LR[config.optimiser, kind], warmup, decay, beta1)

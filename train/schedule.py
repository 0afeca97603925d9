"""Learning rates, and what changes over a run: warm-up and decay, k, temperature.

Everything here is a function of (step, steps), so a resumed run needs no state for it.
"""

from __future__ import annotations

from bsc.errors import ConfigError
from bsc.train.config import Decay, Optimiser

__all__ = ["annealed", "comparable_steps", "default_decay", "default_lr", "default_warmup",
           "lr_scale", "paper_lr"]  # fmt: skip

_LR = {
    ("adam", "continuous"): 1e-2,
    ("adam", "binary"): 1e-2,
    ("signum", "continuous"): 1e-2,
    ("signum", "binary"): 1e-2,
    ("signum_classic", "continuous"): 3e-3,
    ("signum_classic", "binary"): 1e-2,
    ("muon", "continuous"): 1e-2,
    ("muon", "binary"): 3e-2,
}
"""Learning rates: benchmarks/records/step_size_2core-epyc_2026-11-20.md, and of runs of more steps
long_runs_2core-epyc-avx2_2026-11-23.md."""


_SHORT, _MEASURED = 500, 8_000
"""Steps of 2,048 rows up to which the learning rate of Adam's binary coders is that of short runs,
and up to which it was measured that it falls as 1 / steps."""


def comparable_steps(steps: int, batch_rows: int) -> float:
    """Steps of 2,048 rows that want the same learning rate: Adam goes as far in one direction.

    The share of a step that goes where the gradient points grows as the root of the batch.

    >>> comparable_steps(11_684, 512)
    5842.0
    """
    return float(steps * (batch_rows / 2048) ** 0.5)


def default_lr(optimiser: Optimiser, code: str, n_latents: int, steps: float = 0) -> float:
    """Learning rate where none is given, found by sweeps on rows in units of rms.

    A constant by optimiser and code, but for Adam and binary coders, whose best step falls with the
    width and with the length of the run: 1e-2 / sqrt(n_latents / 2^14) with at least 2^10 latents,
    times 500 / steps from 500 steps on, and on from 8,000, which is further than was measured, as
    1 / sqrt(steps). Hybrid coders take the one of continuous coders.

    Args:
        optimiser: of the coder.
        code: of the coder.
        n_latents: of the coder.
        steps: of the run, as `comparable_steps` counts them; 0: a short one.

    >>> [round(default_lr("adam", "binary", n), 4) for n in (512, 1536, 6144, 36864)]
    [0.04, 0.0327, 0.0163, 0.0067]
    >>> [round(default_lr("adam", "binary", 1536, n), 4) for n in (320, 1000, 3000, 8000, 128_000)]
    [0.0327, 0.0163, 0.0054, 0.002, 0.0005]
    """
    kind = "binary" if code == "binary" else "continuous"
    lr = _LR[optimiser, kind]
    if (optimiser, kind) == ("adam", "binary"):
        lr /= float((max(n_latents, 2**10) / 2**14) ** 0.5)
        lr *= _SHORT / min(max(steps, _SHORT), _MEASURED)
        lr *= float((_MEASURED / max(steps, _MEASURED)) ** 0.5)
    return lr


def paper_lr(optimiser: Optimiser, code: str, surrogate: str, n_latents: int) -> float:
    """Learning rate by the rules of the authors' code, for `lr = "paper"`.

    Adam 2e-4 / sqrt(F / 2^14) continuous, 3e-3 / sqrt(F / 2^15) binary; Signum
    5e-3 / sqrt(F / 2^14) continuous, 3e-3 / sqrt(F / 2^15) binary, 3e-2 for Gumbel-softmax, which
    has no rule for Adam. Made for rows as the module gives them (`normalise = "none"`), 2^16 to
    2^20 of them a batch and ten thousand steps; in short runs Adam's continuous rule undertrains.

    Raises:
        ConfigError: the paper has no rule for the optimiser, the code or the surrogate.

    >>> round(paper_lr("adam", "continuous", "sigmoid", 18432), 6)
    0.000189
    >>> round(paper_lr("signum", "binary", "sigmoid", 36864), 5)
    0.00283
    """
    if optimiser not in ("adam", "signum") or code == "hybrid":
        raise ConfigError(
            f"lr='paper': the paper has no learning rate for {optimiser} and {code} coders. Its "
            f"rules are for adam and signum, continuous and binary."
        )
    if surrogate == "gumbel" and code == "binary":
        if optimiser == "adam":
            raise ConfigError(
                "lr='paper': the authors trained Gumbel-softmax coders with Signum alone (3e-2). "
                "Give a number, or optimiser='signum'."
            )
        return 3e-2
    if code == "binary":
        return 3e-3 / float((n_latents / 2**15) ** 0.5)
    base = 2e-4 if optimiser == "adam" else 5e-3
    return base / float((n_latents / 2**14) ** 0.5)


def default_warmup(optimiser: Optimiser) -> float:
    """Share of the steps over which the learning rate rises; schedule-free needs none."""
    return 0.0 if optimiser == "signum" else 0.05


def default_decay(optimiser: Optimiser) -> Decay:
    """How the learning rate falls; schedule-free averages instead."""
    return "none" if optimiser == "signum" else "linear"


def lr_scale(step: int, steps: int, warmup: float, decay: Decay) -> float:
    """Factor of the learning rate at a step: linear warm-up, then constant or linearly to 0.

    Args:
        step: from 0.
        steps: of the run.
        warmup: share of the steps over which it rises.
        decay: afterwards.

    >>> [round(lr_scale(s, 100, 0.05, "linear"), 2) for s in (0, 4, 5, 99)]
    [0.2, 1.0, 1.0, 0.01]
    >>> [lr_scale(s, 100, 0.0, "none") for s in (0, 50, 99)]
    [1.0, 1.0, 1.0]
    """
    rise = round(warmup * steps)
    scale = min(1.0, (step + 1) / max(1, rise))
    if decay == "linear":
        scale = min(scale, (steps - step) / max(1, steps - max(1, rise)))
    return scale


def annealed(first: float, last: float, step: int, steps: int, share: float) -> float:
    """A value that goes linearly from `first` to `last` over a share of the steps, then stays.

    >>> [annealed(64, 32, s, 100, 0.1) for s in (0, 5, 10, 99)]
    [64.0, 48.0, 32, 32]
    """
    over = share * steps
    return last if step >= over else first + (last - first) * step / over

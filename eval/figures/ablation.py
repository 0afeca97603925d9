"""What latents are worth to the model: its loss with some of a coder's latents set to 0.

Latents are put in order by a score and cut into bins of equal firing mass, so that a bin of
frequent latents and one of rare latents turn off as many firings. Each bin is turned off inside
the splice, by the latents' own numbers, and compared with the splice of the whole coder: with the
model as it is, the coder's own error would be counted in every bin. Bins of latents at random are
the control.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from bsc.eval.evaluation import Ablation, Bin, EvaluationFolder, Interval, UltraLatent
from bsc.eval.figures.loss import added_loss, loss_sums
from bsc.eval.figures.scores import read_scores
from bsc.eval.passes.context_pass import LossSums, Variant
from bsc.eval.passes.contexts import Contexts
from bsc.eval.passes.controls import without_latents
from bsc.eval.passes.pieces import Pieces, identity_of
from bsc.eval.passes.row_pass import Sums
from bsc.eval.passes.setting import Setting
from bsc.eval.passes.splice import coder_replacement
from bsc.train.coders.coder import SparseCoder

__all__ = [
    "AblationPlan",
    "Ablated",
    "ablate",
    "ablated",
    "ablation_figures",
    "equal_mass_bins",
    "random_bins",
]

Bins = list[NDArray[np.int64]]


class AblationPlan(NamedTuple):
    """How much is turned off."""

    bins: int
    """Bins of equal firing mass; 0: none."""
    tokens: int
    """Held-out tokens that are predicted."""
    score: str
    """``"rate"`` or a file (figures/scores.py)."""
    singles: int
    """Latents of ultra-high frequency that are turned off one by one."""


def equal_mass_bins(score: NDArray[np.float64], counts: NDArray[np.int64], n_bins: int) -> Bins:
    """Latents in order of score, cut so that each bin has about the same number of firings.

    Args:
        score: (F,); latents whose score is NaN are left out, and so are dead ones.
        counts: (F,) firings.
        n_bins: bins. A latent with more firings than a bin's share fills one or more alone, and
            fewer bins come back.

    Returns:
        The latents of each bin, lowest score first.

    >>> [b.tolist() for b in equal_mass_bins(np.array([3., 1, 2, 9]), np.array([5, 5, 5, 0]), 3)]
    [[1], [2], [0]]
    """
    latents = np.flatnonzero((counts > 0) & np.isfinite(score))
    order = latents[np.argsort(score[latents], kind="stable")]
    if len(order) == 0:
        return []
    mass = counts[order].astype(np.float64)
    middle = (np.cumsum(mass) - mass / 2) / mass.sum()
    bins = np.minimum((middle * n_bins).astype(np.int64), n_bins - 1)
    return [order[bins == b] for b in range(n_bins) if (bins == b).any()]


def random_bins(
    score: NDArray[np.float64], counts: NDArray[np.int64], n_bins: int, seed: int = 0
) -> Bins:
    """Bins of equal firing mass of the same latents in random order."""
    rng = np.random.Generator(np.random.Philox(key=seed))
    shuffled = np.where(np.isfinite(score), rng.random(len(score)), np.nan)
    return equal_mass_bins(shuffled, counts, n_bins)


def ablated(coder: SparseCoder, hookpoint: str, latents: NDArray[np.int64]) -> Variant:
    """The splice of a coder with some latents set to 0."""
    off = torch.zeros(coder.config.n_latents, dtype=torch.bool, device=coder.W_enc.device)
    off[torch.from_numpy(latents).to(off.device)] = True
    return {hookpoint: coder_replacement(coder, lambda code: without_latents(code, off))}


def ablation_figures(
    bins: Sequence[NDArray[np.int64]],
    score: NDArray[np.float64],
    counts: NDArray[np.int64],
    sums: Mapping[str, LossSums],
    names: Sequence[str],
    baseline: str,
    contexts: Contexts,
) -> list[Bin]:
    """What turning off each bin adds to the loss of the spliced model.

    Args:
        bins: latents of each bin.
        score: (F,).
        counts: (F,) firings.
        sums: of every variant by name.
        names: variant of each bin.
        baseline: variant of the whole coder.
        contexts: what was predicted.
    """
    total = max(1, int(counts.sum()))
    found = []
    for latents, name in zip(bins, names, strict=True):
        delta, interval = added_loss(sums[name], sums[baseline], contexts)
        weights = counts[latents]
        one = Bin(
            latents=len(latents),
            firing_share=float(weights.sum() / total),
            score=float((score[latents] * weights).sum() / weights.sum()),
            delta_ce=delta,
            delta_ce_interval=interval,
        )
        found.append(one)
    return found


class Ablated(NamedTuple):
    """What came of turning off latents of a coder."""

    figures: Ablation
    singles: list[tuple[float, Interval]]
    """Added loss without each of the most frequent latents, and its interval."""


class _TurnedOff(NamedTuple):
    """Groups of latents of a coder."""

    score: NDArray[np.float64]
    bins: Bins
    random: Bins
    singles: Bins

    @property
    def groups(self) -> dict[str, NDArray[np.int64]]:
        """Every group by the ending of its variant's name."""
        kinds = {"bins": self.bins, "random": self.random, "ultra": self.singles}
        return {f"{k}{i}": group for k, groups in kinds.items() for i, group in enumerate(groups)}


def ablate(
    setting: Setting,
    plan: AblationPlan,
    contexts: Contexts,
    identity: dict[str, Any],
    sums: Mapping[str, Sums],
    ultra: Mapping[str, list[UltraLatent]],
) -> dict[str, Ablated]:
    """Turn off bins of latents, and frequent latents one by one.

    Args:
        setting: the run and its model.
        plan: how much is turned off.
        contexts: held-out text.
        identity: what decides the result beside the plan.
        sums: of every coder.
        ultra: latents of ultra-high frequency of every coder.

    Returns:
        By coder; nothing where nothing was to be turned off.
    """
    turned_off = _turned_off(setting, plan, sums, ultra)
    variants: dict[str, Variant] = {}
    for name, own in turned_off.items():
        hook, coder = setting.hookpoint(name), setting.coders[name]
        if own.groups:
            variants[name] = {hook: coder_replacement(coder)}
        for ending, latents in own.groups.items():
            variants[f"{name}|{ending}"] = ablated(coder, hook, latents)
    if not variants:
        return {}
    part = contexts.first(plan.tokens)
    listed = {
        name: [
            [kind, [latents.tolist() for latents in groups]]
            for kind, groups in (("bins", own.bins), ("random", own.random), ("ultra", own.singles))
        ]
        for name, own in turned_off.items()
    }
    pieces = Pieces.open(
        EvaluationFolder(setting.run).path / "ablation",
        identity | {"tokens": plan.tokens, "turned_off": identity_of(listed)},
    )
    losses = loss_sums(setting, "ablations", part, variants, pieces)
    found = {}
    for name, own in turned_off.items():
        bins, random = (
            ablation_figures(
                groups,
                own.score,
                sums[name].counts,
                losses,
                [f"{name}|{kind}{i}" for i in range(len(groups))],
                name,
                part,
            )
            for kind, groups in (("bins", own.bins), ("random", own.random))
        )
        figures = Ablation(
            score=Path(plan.score).name,
            predicted_tokens=int(part.counts.sum()),
            bins=bins,
            random=random,
        )
        singles = [
            added_loss(losses[f"{name}|ultra{i}"], losses[name], part)
            for i in range(len(own.singles))
        ]
        found[name] = Ablated(figures, singles)
    return found


def _turned_off(
    setting: Setting,
    plan: AblationPlan,
    sums: Mapping[str, Sums],
    ultra: Mapping[str, list[UltraLatent]],
) -> dict[str, _TurnedOff]:
    """What is turned off of every coder."""
    n_latents = {name: coder.config.n_latents for name, coder in setting.coders.items()}
    scores = read_scores(plan.score, n_latents)
    found = {}
    for name in setting.coders:
        counts = sums[name].counts
        score = counts / sums[name].rows if scores is None else scores[name]
        found[name] = _TurnedOff(
            score,
            equal_mass_bins(score, counts, plan.bins) if plan.bins else [],
            random_bins(score, counts, plan.bins) if plan.bins else [],
            [np.array([latent.latent]) for latent in ultra[name]][: plan.singles],
        )
    return found

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
) -> list[dict[str, Any]]:
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
        found.append({
            "latents": len(latents),
            "firing_share": float(weights.sum() / total),
            "score": float((score[latents] * weights).sum() / weights.sum()),
            "delta_ce": delta,
            "delta_ce_interval": interval,
        })  # fmt: skip
    return found


def ablate(
    setting: Setting, plan: AblationPlan, contexts: Contexts, folder: Path,
    identity: dict[str, Any], sums: Mapping[str, Sums], figures: dict[str, dict[str, Any]],
) -> None:  # fmt: skip
    """Turn off bins of latents, and frequent latents one by one; adds to `figures`."""
    n_latents = {name: coder.config.n_latents for name, coder in setting.coders.items()}
    scores = read_scores(plan.score, n_latents)
    variants: dict[str, Variant] = {}
    groups_of = {}
    for name, coder in setting.coders.items():
        hook, counts = setting.hookpoint(name), sums[name].counts
        score = counts / sums[name].rows if scores is None else scores[name]
        bins = equal_mass_bins(score, counts, plan.bins) if plan.bins else []
        control = random_bins(score, counts, plan.bins) if plan.bins else []
        single = [np.array([u["latent"]]) for u in figures[name]["ultra"]][: plan.singles]
        kinds = {"bins": bins, "random": control, "ultra": single}
        groups_of[name] = (score, kinds)
        if not any(kinds.values()):
            continue
        variants[name] = {hook: coder_replacement(coder)}
        for kind, groups in kinds.items():
            for i, latents in enumerate(groups):
                variants[f"{name}|{kind}{i}"] = ablated(coder, hook, latents)
    if not variants:
        return
    part = contexts.first(plan.tokens)
    turned_off = {
        name: [[kind, [latents.tolist() for latents in groups]] for kind, groups in kinds.items()]
        for name, (_, kinds) in groups_of.items()
    }
    pieces = Pieces.open(
        folder / "ablation",
        identity | {"tokens": plan.tokens, "turned_off": identity_of(turned_off)},
    )
    found = loss_sums(setting, "ablations", part, variants, pieces)
    for name, (score, kinds) in groups_of.items():
        counts = sums[name].counts
        figures[name]["ablation"] = {
            "score": Path(plan.score).name, "predicted_tokens": int(part.counts.sum())
        } | {
            kind: ablation_figures(
                groups, score, counts, found, [f"{name}|{kind}{i}" for i in range(len(groups))],
                name, part,
            )
            for kind, groups in kinds.items()
            if kind != "ultra"
        }  # fmt: skip
        for i in range(len(kinds["ultra"])):
            cost, interval = added_loss(found[f"{name}|ultra{i}"], found[name], part)
            figures[name]["ultra"][i] |= {"delta_ce": cost, "delta_ce_interval": interval}

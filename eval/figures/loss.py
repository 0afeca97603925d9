"""What coders and ablations cost the language model: which variants are run, and their figures."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from bsc.cache.store.kept import kept_moments
from bsc.eval.evaluation import Interval, LossFigures
from bsc.eval.figures.intervals import ratio_intervals
from bsc.eval.passes.context_pass import CLEAN, LossSums, Variant, joined, pass_over_contexts
from bsc.eval.passes.contexts import Contexts
from bsc.eval.passes.controls import Calibration, binarised
from bsc.eval.passes.pieces import Pieces
from bsc.eval.passes.setting import Setting
from bsc.eval.passes.splice import coder_replacement, mean_replacement, zero_replacement
from bsc.progress import stage

__all__ = ["added_loss", "loss_figures", "loss_sums", "loss_variants", "together"]


def together(setting: Setting) -> dict[str, list[str]]:
    """Coders that differ in their hookpoint alone, by what they share, where there are several."""
    groups: dict[str, list[str]] = {}
    for name in setting.coders:
        hook = setting.hookpoint(name)
        groups.setdefault(name.removeprefix(f"{hook}/"), []).append(name)
    return {label: names for label, names in groups.items() if len(names) > 1}


def loss_variants(setting: Setting, calibrations: Mapping[str, Calibration]) -> dict[str, Variant]:
    """Ablations of every hookpoint, every coder, every code without its values, and coders that
    differ in their hookpoint alone all at once."""
    variants: dict[str, Variant] = {}
    for hook in setting.hookpoints:
        moments = kept_moments(setting.store.train, f"{hook}/output", setting.without_tokens)
        mean = moments.mean.to(setting.lm.model.device)
        variants[f"{hook}|zero"] = {hook: zero_replacement}
        variants[f"{hook}|mean"] = {hook: mean_replacement(mean)}
    for name, coder in setting.coders.items():
        hook = setting.hookpoint(name)
        variants[name] = {hook: coder_replacement(coder)}
        if name in calibrations:
            edit = partial(binarised, coder, calibrations[name])
            variants[f"{name}|binarised"] = {hook: coder_replacement(coder, edit)}
    for label, names in together(setting).items():
        variants[f"together|{label}"] = {
            setting.hookpoint(n): coder_replacement(setting.coders[n]) for n in names
        }
    return variants


def loss_sums(
    setting: Setting,
    label: str,
    contexts: Contexts,
    variants: Mapping[str, Variant],
    pieces: Pieces,
) -> dict[str, LossSums]:
    """Sums by document of every variant."""
    parts = []
    with stage(label, int(contexts.counts.sum()) * (len(variants) + 1), "predictions") as progress:
        work = pass_over_contexts(
            setting.lm, contexts, variants, pieces, without_tokens=setting.without_tokens
        )
        for piece in work:
            parts.append(piece)
            progress.advance(piece.tokens * (len(variants) + 1))
    return joined(parts, contexts.documents)


def loss_figures(
    name: str, sums: Mapping[str, LossSums], contexts: Contexts, hooks: list[str]
) -> LossFigures:
    """What a variant costs the model, against the model as it is and against ablations."""
    clean, spliced = sums[CLEAN], sums[name]
    predicted = contexts.counts.astype(np.float64)
    columns = np.stack([spliced.nats - clean.nats, spliced.kl, spliced.right - clean.right], axis=1)
    delta, kl, top1 = (float(c) for c in columns.sum(axis=0) / predicted.sum())
    intervals = ratio_intervals(columns, predicted)
    (kl_interval,) = ratio_intervals(columns[:, 1:2], predicted, positive=True)
    some: dict[str, Any] = {}
    new = contexts.unseen_counts.astype(np.float64)
    if 0 < new.sum() < predicted.sum():
        added = spliced.nats_unseen - clean.nats_unseen
        some["delta_ce_unseen"] = float(added.sum() / new.sum())
        (some["delta_ce_unseen_interval"],) = ratio_intervals(added[new > 0, None], new[new > 0])
    for kind in ("zero", "mean"):
        ablations = [f"{h}|{kind}" for h in hooks]
        if len(ablations) == 1 and name not in ablations:
            ablation, _ = added_loss(sums[ablations[0]], clean, contexts)
            some[f"loss_recovered_{kind}"] = 1 - delta / ablation if ablation else None
    if f"{name}|binarised" in sums:
        cost, interval = added_loss(sums[f"{name}|binarised"], clean, contexts)
        some |= {"delta_ce_binarised": cost, "delta_ce_binarised_interval": interval}
    return LossFigures(
        ce_spliced=float(spliced.nats.sum() / predicted.sum()),
        delta_ce=delta,
        delta_ce_interval=intervals[0],
        kl=kl,
        kl_interval=kl_interval,
        delta_top1=top1,
        delta_top1_interval=intervals[2],
        **some,
    )


def added_loss(changed: LossSums, base: LossSums, contexts: Contexts) -> tuple[float, Interval]:
    """Mean of changed - base in nats per predicted token, with its interval over documents.

    Args:
        changed: with something spliced in.
        base: of the same contexts without it, or with something else.
        contexts: what was predicted.
    """
    difference = changed.nats - base.nats
    counts = contexts.counts.astype(np.float64)
    (interval,) = ratio_intervals(difference[:, None], counts)
    return float(difference.sum() / counts.sum()), interval

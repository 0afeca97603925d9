"""Whether two coders have the same latents: decoder rows matched one to one, and firings compared.

Latents that fired in neither are left out. Matching maximises the sum of cosines of decoder rows
(Hungarian algorithm); the same matching against a randomly rotated copy of the other decoder says
what chance gives, and a copy in another order gives 1. MMCS, the mean over latents of the largest
cosine with any latent of the other (Sharkey et al. 2022), lets several share one.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from bsc.devices import available_bytes
from bsc.eval.evaluation import Likeness, Pair
from bsc.eval.figures.fidelity import fvu_difference
from bsc.eval.figures.loss import added_loss
from bsc.eval.passes.codes import Codes
from bsc.eval.passes.context_pass import LossSums
from bsc.eval.passes.contexts import Contexts
from bsc.eval.passes.row_pass import Sums
from bsc.eval.passes.setting import Setting
from bsc.progress import stage
from bsc.train.coders.coder import SparseCoder
from bsc.train.run_config import RunCoder
from bsc.typed import combined

__all__ = [
    "Matching",
    "comparable_pairs",
    "firing_jaccard",
    "match_latents",
    "run_stability",
    "stability_figures",
]

Differs = Literal["seed", "code"]
SIMILAR = (0.7, 0.9)
"""Cosines above which matched latents are counted."""
HUNGARIAN_LIMIT = 12_288
"""With more living latents, each one is matched with its mutual nearest neighbour, if it has one:
the Hungarian algorithm takes time with the cube of the number."""


class Matching(NamedTuple):
    """Pairs of latents of two coders."""

    a: NDArray[np.int64]
    b: NDArray[np.int64]
    cosine: NDArray[np.float64]
    method: str
    """``"hungarian"`` or ``"mutual nearest"``."""
    mmcs: float
    """Mean over the latents of a, and over those of b, of the largest cosine."""


def match_latents(
    W_a: Tensor, W_b: Tensor, alive_a: NDArray[np.bool_], alive_b: NDArray[np.bool_]
) -> Matching:
    """Match decoder rows, (F_a, d) and (F_b, d), of latents that are alive."""
    of_a, of_b = np.flatnonzero(alive_a), np.flatnonzero(alive_b)
    rows = [
        torch.nn.functional.normalize(w.detach().float()[torch.from_numpy(i).to(w.device)], dim=1)
        for w, i in ((W_a, of_a), (W_b, of_b))
    ]
    if not len(of_a) or not len(of_b):
        empty = np.empty(0, np.int64)
        return Matching(empty, empty, np.empty(0), "hungarian", 0.0)
    nearest, back, mmcs = _nearest(*rows)
    if max(len(of_a), len(of_b)) <= HUNGARIAN_LIMIT:
        i, j = linear_sum_assignment(-(rows[0] @ rows[1].T).cpu().numpy())
        method = "hungarian"
    else:
        i = np.flatnonzero(back[nearest] == np.arange(len(of_a)))
        j, method = nearest[i], "mutual nearest"
    pairs = (w[torch.from_numpy(n).to(w.device)] for w, n in zip(rows, (i, j), strict=True))
    cosine = torch.mul(*pairs).sum(dim=1)
    return Matching(of_a[i], of_b[j], cosine.double().cpu().numpy(), method, mmcs)


def _nearest(a: Tensor, b: Tensor) -> tuple[NDArray[np.int64], NDArray[np.int64], float]:
    """For each unit row of a the nearest of b, for each of b the nearest of a, and the MMCS.

    Some rows at a time: the matrix of all cosines of wide coders would be gigabytes.
    """
    forth, forth_cosine = [], []
    back_cosine = torch.full((len(b),), -torch.inf, device=b.device)
    back = torch.zeros(len(b), dtype=torch.int64, device=b.device)
    for start in range(0, len(a), 2048):
        cosine = a[start : start + 2048] @ b.T
        best = cosine.max(dim=1)
        forth.append(best.indices)
        forth_cosine.append(best.values)
        best = cosine.max(dim=0)
        better = best.values > back_cosine
        back = torch.where(better, best.indices + start, back)
        back_cosine = torch.where(better, best.values, back_cosine)
    mmcs = (float(torch.cat(forth_cosine).mean()) + float(back_cosine.mean())) / 2
    return torch.cat(forth).cpu().numpy(), back.cpu().numpy(), mmcs


def firing_jaccard(a: Codes, b: Codes, matching: Matching) -> NDArray[np.float64]:
    """Rows where both latents of a matched pair fire over rows where either does, by pair."""
    size_b = len(b.counts)
    to_b = np.full(len(a.counts), -1)
    to_b[matching.a] = matching.b
    both = np.zeros(size_b, np.int64)
    for of_a, of_b in zip(a, b, strict=True):
        latent = to_b[of_a.latent]
        keys = (of_a.row * size_b + latent)[latent >= 0]
        common = np.intersect1d(keys, of_b.row * size_b + of_b.latent, assume_unique=True)
        both += np.bincount(common % size_b, minlength=size_b)
    together = both[matching.b]
    either = a.counts[matching.a] + b.counts[matching.b] - together
    return np.asarray(together / np.maximum(1, either), np.float64)


def stability_figures(
    a: SparseCoder,
    b: SparseCoder,
    counts: tuple[NDArray[np.int64], NDArray[np.int64]],
    codes: tuple[Codes, Codes] | None = None,
    *,
    seed: int = 0,
) -> Likeness:
    """How alike two coders' latents are.

    Args:
        a: one coder.
        b: another of the same output width.
        counts: firings of each coder's latents.
        codes: over the same rows, for the Jaccard index of firings; None leaves it out.
        seed: of the rotation.
    """
    alive = (counts[0] > 0, counts[1] > 0)
    # Beside coders that fill a GPU there may be no room for copies of their rows.
    device = a.W_dec.device
    largest = max(w.numel() for w in (a.W_dec, b.W_dec))
    where = device if available_bytes(device) > 5 * 4 * largest else "cpu"
    rows_a, rows_b = (w.detach().to(where).float() for w in (a.W_dec, b.W_dec))
    matching = match_latents(rows_a, rows_b, *alive)
    generator = torch.Generator().manual_seed(seed)
    width = rows_b.shape[1]
    rotation = torch.linalg.qr(torch.randn(width, width, generator=generator))[0]
    chance = match_latents(rows_a, rows_b @ rotation.to(where), *alive)
    n = int(alive[0].sum())
    weights = counts[0][matching.a].astype(np.float64)
    jaccard = firing_jaccard(*codes, matching) if codes is not None else None
    return Likeness(
        living=[n, int(alive[1].sum())],
        matched=len(matching.a),
        method=matching.method,
        cosine=_mean(matching.cosine),
        cosine_weighted=float((matching.cosine * weights).sum() / max(1.0, weights.sum())),
        cosine_chance=_mean(chance.cosine),
        share_above={str(t): float((matching.cosine > t).sum() / max(1, n)) for t in SIMILAR},
        mmcs=matching.mmcs,
        jaccard=None if jaccard is None else _mean(jaccard),
    )


def _mean(values: NDArray[np.float64]) -> float:
    return float(values.mean()) if len(values) else 0.0


def comparable_pairs(coders: Sequence[RunCoder]) -> list[tuple[Differs, str, str]]:
    """Coders whose latents are compared: those that differ in the seed alone, or in the code.

    Args:
        coders: of a run.

    Returns:
        (``"seed"`` or ``"code"``, name, name): each seed with the next one, and of the same seed, k
        and width the binary with the continuous coder where there is one of each.
    """
    pairs: list[tuple[Differs, str, str]] = []
    alike: dict[RunCoder, list[str]] = {}
    arms: dict[tuple[object, ...], dict[str, list[str]]] = {}
    for planned in coders:
        alike.setdefault(planned.but_for_the_seed, []).append(planned.name)
        c = planned.coder
        key = (planned.hookpoint, c.site, c.select, c.n_latents, c.k, planned.seed)
        arms.setdefault(key, {}).setdefault(c.code, []).append(planned.name)
    for names in alike.values():
        pairs += [("seed", a, b) for a, b in itertools.pairwise(names)]
    for arm in arms.values():
        if len(arm.get("binary", [])) == 1 and len(arm.get("continuous", [])) == 1:
            pairs.append(("code", arm["binary"][0], arm["continuous"][0]))
    return pairs


def run_stability(
    setting: Setting,
    codes: Mapping[str, Codes],
    sums: Mapping[str, Sums],
    losses: Mapping[str, LossSums],
    contexts: Contexts,
) -> list[Pair]:
    """Figures of every pair of a run's coders that can be compared."""
    coders = [c for c in setting.run.config().coders if c.name in setting.coders]
    pairs = comparable_pairs(coders)
    found: list[Pair] = []
    if not pairs:
        return found
    with stage("stability", len(pairs), "pairs") as progress:
        for differs, a, b in pairs:
            likeness = stability_figures(
                setting.coders[a],
                setting.coders[b],
                (codes[a].counts, codes[b].counts),
                (codes[a], codes[b]),
            )
            fvu, fvu_interval = fvu_difference(sums[a], sums[b])
            cost, cost_interval = added_loss(losses[a], losses[b], contexts)
            pair = combined(
                Pair,
                likeness,
                differs=differs,
                a=a,
                b=b,
                fvu_difference=fvu,
                fvu_interval=fvu_interval,
                delta_ce_difference=cost,
                delta_ce_interval=cost_interval,
            )
            found.append(pair)
            progress.advance(1)
    return found

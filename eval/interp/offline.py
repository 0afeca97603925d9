"""Two scores of all latents that need no language model, so that they can be had offline.

    RUN/interp/offline/offline.json             figures
    RUN/interp/offline/<coder>/00000.safetensors   AUC and balanced accuracy of every latent
    RUN/interp/offline/scores-<score>.csv       coder, latent, score

They are called what they are, predictability and overlap; neither is an interpretability score as
a language model gives it, and they stand beside those.
"""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from bsc.errors import UserError
from bsc.eval.evaluation import Interval
from bsc.eval.figures.intervals import ratio_intervals
from bsc.eval.interp.aggregate import summary
from bsc.eval.interp.config import DECIDING
from bsc.eval.interp.material import Material, Materials
from bsc.eval.interp.overlap import overlap_answers, token_weights
from bsc.eval.interp.predictability import (
    Contexts,
    Predictability,
    contexts_of_tokens,
    predictability,
)
from bsc.eval.interp.questions import CHANCE, intruder_groups, question_rng
from bsc.eval.interp.scores import (
    OFFLINE_VERSION,
    AllMeans,
    Coverage,
    InterpFolder,
    LatentScore,
    Mean,
    Offline,
    OfflineCoder,
    OverlapScores,
    PredictabilityScores,
    read_offline,
    say_what_is_left_out,
)
from bsc.eval.passes.pieces import Pieces
from bsc.files import write_atomically
from bsc.progress import stage
from bsc.typed import combined, write_typed

__all__ = ["LatentNumber", "offline_scores", "scores_csv"]


class LatentNumber(NamedTuple):
    """A line of a table of scores."""

    coder: str
    latent: int
    score: float


def offline_scores(materials: Materials) -> Offline:
    """Compute what is not there yet and write it beside the run.

    Args:
        materials: of the run's coders.
    """
    folder = InterpFolder(materials.run).offline
    folder.mkdir(parents=True, exist_ok=True)
    contexts: dict[str, Contexts] = {}
    coders: dict[str, OfflineCoder] = {}
    tables: dict[str, list[LatentNumber]] = {"predictability": [], "overlap": []}
    with stage("offline scores", len(materials.names), "coders") as progress:
        for material in materials:
            name = material.coder
            scores = _predictability(materials, material, contexts)
            overlaps = _overlap(material)
            means = summary(overlaps, material.chosen, material.counts, material.rows, "score")
            coders[name] = OfflineCoder(
                settings={n: getattr(materials.config, n) for n in DECIDING},
                predictability=_figures(scores, material.counts),
                overlap=combined(OverlapScores, means, chance=CHANCE["intruder"]),
            )
            tables["predictability"] += [
                LatentNumber(name, int(i), round(float(scores.auc[i]), 6))
                for i in np.flatnonzero(np.isfinite(scores.auc))
            ]
            tables["overlap"] += [
                LatentNumber(name, i, one.score)
                for i, one in overlaps.items()
                if one.score is not None
            ]
            progress.advance(1, name)
    result = Offline(version=OFFLINE_VERSION, store_id=materials.store.store_id, coders=coders)
    if materials.config.only:
        # Of latents that were named, for a look; they are no sample of the coder.
        return result
    if len(materials.names) < len(materials.every_name):
        result = _with_other_coders(result, tables, folder)
    for name, rows in tables.items():
        write_atomically(folder / f"scores-{name}.csv", scores_csv(rows))
    write_typed(folder / "offline.json", result)
    return result


def _with_other_coders(
    result: Offline, tables: dict[str, list[LatentNumber]], folder: Path
) -> Offline:
    """With what was there of coders that were not computed now."""
    try:
        old = read_offline(folder)
    except UserError as error:
        say_what_is_left_out(folder, error)
        return result
    try:
        if old.store_id != result.store_id:
            return result
        others = {n: c for n, c in old.coders.items() if n not in result.coders}
        added: dict[str, list[LatentNumber]] = {}
        for name in tables:
            with (folder / f"scores-{name}.csv").open() as file:
                added[name] = [
                    LatentNumber(row["coder"], int(row["latent"]), float(row["score"]))
                    for row in csv.DictReader(file)
                    if row["coder"] in others
                ]
    except (OSError, ValueError, KeyError, TypeError):
        return result
    for name, rows in added.items():
        tables[name] += rows
    return result.model_copy(update={"coders": result.coders | others})


def scores_csv(rows: list[LatentNumber]) -> str:
    """A table of scores that `bsc eval --ablation-score` reads."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(LatentNumber._fields)
    writer.writerows(rows)
    return text.getvalue()


def _predictability(
    materials: Materials, material: Material, contexts: dict[str, Contexts]
) -> Predictability:
    """Predictability of all latents of a coder, computed once."""
    identity = {"version": OFFLINE_VERSION, **materials.identity(material.coder)}
    folder = materials.run.interp_folder / "offline" / material.coder
    pieces = Pieces.open(folder, identity)
    if not pieces.done(0):
        hook = materials.hookpoint(material.coder)
        if hook not in contexts:
            split_text = materials.split_text
            contexts[hook] = contexts_of_tokens(
                split_text.ids,
                split_text.doc_id,
                split_text.position,
                materials.read[hook],
                split_text.part,
                seed=materials.config.seed,
            )
        scores = predictability(material.code, contexts[hook], seed=materials.config.seed)
        pieces.write(0, scores._asdict())
    return Predictability(**pieces.read(0))


def _figures(scores: Predictability, counts: NDArray[np.int64]) -> PredictabilityScores:
    """Means over all latents that have a score, and by firing rate."""
    there = np.isfinite(scores.auc)
    means = {}
    for name, values in scores._asdict().items():
        v, p = values[there], counts[there].astype(np.float64)
        ones = np.ones_like(v)
        intervals: list[Interval] = [None, None]
        if len(v):
            intervals = ratio_intervals(np.stack([v, p * v], 1), np.stack([ones, p], 1))
        unweighted, weighted = (
            Mean(mean=float((w * v).sum() / w.sum()) if len(v) else None, interval=interval)
            for w, interval in zip((ones, p), intervals, strict=True)
        )
        means[name] = AllMeans(unweighted=unweighted, weighted=weighted)
    return PredictabilityScores(
        latents=int(there.sum()),
        coverage=Coverage(
            unweighted=float(there.sum() / max(1, (counts > 0).sum())),
            weighted=float(counts[there].sum() / max(1, counts.sum())),
        ),
        **means,
    )


def _overlap(material: Material) -> dict[int, LatentScore]:
    """Overlap scores of the drawn latents, by the questions that a judge's intruder test has."""
    evidence = [material.evidence(i) for i in material.chosen.latents()]
    weights = token_weights(
        material.texts, (w for one in evidence for w in (*one.firing, *one.silent))
    )
    found: dict[int, LatentScore] = {}
    for one in evidence:
        groups = []
        if one.why_not is None:
            rng = question_rng(material.config.seed, one.latent, "intruder")
            groups = intruder_groups(one, rng)
        right = overlap_answers(material.texts, groups, weights)
        n = len(right)
        mean = float(np.mean(right)) if n else None
        smoothed = (sum(right) + 1) / (n + 2)
        found[one.latent] = LatentScore(
            state="ok" if n else "unscorable",
            score=mean,
            low=mean or 0.0,
            high=1.0 if mean is None else mean,
            excerpts=n,
            statuses={},
            noise=float(np.sqrt(smoothed * (1 - smoothed) / (n + 2))),
        )
    return found

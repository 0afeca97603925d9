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
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bsc.eval.figures.intervals import ratio_intervals
from bsc.eval.interp.aggregate import summary
from bsc.eval.interp.material import Material, Materials
from bsc.eval.interp.overlap import overlap_answers, token_weights
from bsc.eval.interp.predictability import (
    Contexts,
    Predictability,
    contexts_of_tokens,
    predictability,
)
from bsc.eval.interp.questions import CHANCE, intruder_groups, question_rng
from bsc.eval.passes.pieces import Pieces
from bsc.files import write_atomically
from bsc.progress import stage
from bsc.records import read_record, write_record

__all__ = ["OFFLINE_VERSION", "offline_scores"]

OFFLINE_VERSION = 1
_DECIDING = ("latents", "census_rate", "min_firings", "test_windows", "window", "seed")
"""What of the config changes an offline score. Marks are part of the overlap, so they are always
those of all firing tokens."""


def offline_scores(materials: Materials) -> dict[str, Any]:
    """Compute what is not there yet and write it beside the run.

    Args:
        materials: of the run's coders.

    Returns:
        What offline.json holds.
    """
    folder = materials.run.interp_folder / "offline"
    folder.mkdir(parents=True, exist_ok=True)
    contexts: dict[str, Contexts] = {}
    coders: dict[str, Any] = {}
    tables: dict[str, list[dict[str, Any]]] = {"predictability": [], "overlap": []}
    with stage("offline scores", len(materials.names), "coders") as progress:
        for material in materials:
            name = material.coder
            scores = _predictability(materials, material, contexts)
            overlaps = _overlap(material)
            coders[name] = {
                "settings": {n: getattr(materials.config, n) for n in _DECIDING},
                "predictability": _figures(scores, material.counts),
                "overlap": {
                    "chance": CHANCE["intruder"],
                    **summary(overlaps, material.chosen, material.counts, material.rows, "score"),
                },
            }
            tables["predictability"] += [
                {"coder": name, "latent": int(i), "score": round(float(scores.auc[i]), 6)}
                for i in np.flatnonzero(np.isfinite(scores.auc))
            ]
            tables["overlap"] += [
                {"coder": name, "latent": i, "score": one["score"]}
                for i, one in overlaps.items() if one["score"] is not None
            ]  # fmt: skip
            progress.advance(1, name)
    result = {
        "version": OFFLINE_VERSION,
        "store_id": materials.store.store_id,
        "coders": coders,
    }  # fmt: skip
    if materials.config.only:
        # Of latents that were named, for a look; they are no sample of the coder.
        return result
    if len(materials.names) < len(materials.every_name):
        _add_other_coders(result, tables, folder)
    for name, rows in tables.items():
        write_atomically(folder / f"scores-{name}.csv", scores_csv(rows))
    write_record(folder / "offline.json", result)
    return result


def _add_other_coders(
    result: dict[str, Any], tables: dict[str, list[dict[str, Any]]], folder: Path
) -> None:
    """Keep what was there of coders that were not computed now."""
    try:
        old = read_record(folder / "offline.json", "scores", OFFLINE_VERSION)
        if old["store_id"] == result["store_id"]:
            names = set(old["coders"]) - set(result["coders"])
            for name, rows in tables.items():
                with (folder / f"scores-{name}.csv").open() as file:
                    rows += [row for row in csv.DictReader(file) if row["coder"] in names]
            result["coders"] |= {name: old["coders"][name] for name in names}
    except (OSError, ValueError, KeyError, TypeError):
        return


def scores_csv(rows: list[dict[str, Any]]) -> str:
    """A table of scores that `bsc eval --ablation-score` reads."""
    text = io.StringIO()
    writer = csv.DictWriter(text, ("coder", "latent", "score"), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _predictability(
    materials: Materials, material: Material, contexts: dict[str, Contexts]
) -> Predictability:
    """Of all latents of a coder, computed once."""
    identity = {"version": OFFLINE_VERSION, **materials.identity(material.coder)}
    folder = materials.run.interp_folder / "offline" / material.coder
    pieces = Pieces.open(folder, identity)
    if not pieces.done(0):
        hook = materials.hookpoint(material.coder)
        if hook not in contexts:
            windows = materials.windows
            contexts[hook] = contexts_of_tokens(
                windows.ids, windows.doc_id, windows.position, materials.read[hook],
                windows.part, seed=materials.config.seed,
            )  # fmt: skip
        scores = predictability(material.code, contexts[hook], seed=materials.config.seed)
        pieces.write(0, scores._asdict())
    return Predictability(**pieces.read(0))


def _figures(scores: Predictability, counts: NDArray[np.int64]) -> dict[str, Any]:
    """Means over all latents that have a score, and by firing rate."""
    there = np.isfinite(scores.auc)
    found: dict[str, Any] = {
        "latents": int(there.sum()),
        "coverage": {
            "unweighted": float(there.sum() / max(1, (counts > 0).sum())),
            "weighted": float(counts[there].sum() / max(1, counts.sum())),
        },
    }
    for name, values in scores._asdict().items():
        v, p = values[there], counts[there].astype(np.float64)
        ones = np.ones_like(v)
        intervals = (
            ratio_intervals(np.stack([v, p * v], 1), np.stack([ones, p], 1))
            if len(v) else [None, None]
        )  # fmt: skip
        found[name] = {
            design: {
                "mean": float((w * v).sum() / w.sum()) if len(v) else None, "interval": interval
            }
            for design, w, interval in zip(
                ("unweighted", "weighted"), (ones, p), intervals, strict=True
            )
        }  # fmt: skip
    return found


def _overlap(material: Material) -> dict[int, dict[str, Any]]:
    """Of the latents that were drawn, by the questions that a judge's intruder test has."""
    evidence = [material.evidence(i) for i in material.chosen.latents()]
    weights = token_weights(
        material.texts, (w for one in evidence for w in (*one.firing, *one.silent))
    )
    found: dict[int, dict[str, Any]] = {}
    for one in evidence:
        groups = []
        if one.why_not is None:
            rng = question_rng(material.config.seed, one.latent, "intruder")
            groups = intruder_groups(one, rng)
        right = overlap_answers(material.texts, groups, weights)
        n = len(right)
        mean = float(np.mean(right)) if n else None
        smoothed = (sum(right) + 1) / (n + 2)
        found[one.latent] = {
            "score": mean,
            "low": mean or 0.0,
            "high": 1.0 if mean is None else mean,
            "noise": float(np.sqrt(smoothed * (1 - smoothed) / (n + 2))),
        }
    return found

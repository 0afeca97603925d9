"""Neuronpedia's upload format: JSON lines of a source, its latents, their examples, explanations.

    <model>/<source>/{release,model,sourceset,source}.jsonl
    <model>/<source>/{features,activations,explanations}/batch-0.jsonl.gz

Fields that need what bsc does not compute (logits, correlated neurons) are empty. Examples are the
excerpts of all documents, by tenth of a latent's firings; of a binary latent every firing is 1.
"""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from bsc.errors import UserError
from bsc.eval.figures.examples import STRATA
from bsc.eval.interp.material import Material, Materials
from bsc.eval.interp.scores import judged_latents
from bsc.eval.show import load_sample
from bsc.files import make_folder, write_atomically
from bsc.progress import stage

__all__ = ["write_neuronpedia"]

PER_STRATUM = 2
_WHEN = "1970-01-01T00:00:00"
"""The same every time, so that equal inputs give equal bytes."""


Row = dict[str, Any]
"""A line of a file, by field of the format."""


def _lines(rows: Iterable[Row]) -> bytes:
    return "".join(json.dumps(row, sort_keys=True) + "\n" for row in rows).encode()


def write_neuronpedia(
    materials: Materials, material: Material, folder: Path, *, creator: str = "bsc",
    explanations: Path | None = None,
) -> Path:  # fmt: skip
    """Write one coder.

    Args:
        materials: of the run.
        material: of the coder.
        folder: a new or empty one.
        creator: name and id of who publishes it.
        explanations: latents.jsonl of a judge's results, for the explanations and their scores.

    Returns:
        The folder of the source.

    Raises:
        UserError: the folder is not new, or the explanations cannot be read.
    """
    hook = materials.hookpoint(material.coder)
    model = str(materials.store.attributes["model"]["name"]).split("/")[-1]
    layer = next((part for part in hook.split(".") if part.isdigit()), "0")
    source_set = material.coder.split("/")[-1]
    source = f"{layer}-{source_set}"
    explained = _explanations(explanations, material.coder, model, source)
    make_folder(folder, "Neuronpedia export")
    place = folder / model / source
    for kind in ("features", "activations", "explanations"):
        (place / kind).mkdir(parents=True)
    by = {"creatorId": creator, "createdAt": _WHEN}
    named = {"creatorName": creator}
    heads: dict[str, Row] = {
        "release": {"name": source_set, "description": material.coder, "descriptionShort":
                    material.coder, "urls": [], **named, "creatorNameShort": creator, **by},
        "model": {"id": model, "instruct": False, "displayNameShort": model,
                  "displayName": model, **by},
        "sourceset": {"modelId": model, "name": source_set, "releaseName": source_set,
                      "description": material.coder, "visibility": "PUBLIC", **named, **by},
        "source": {"id": source, "modelId": model, "setName": source_set, "visibility": "PUBLIC",
                   "num_tokens_in_prompt": material.texts.length, **by},
    }  # fmt: skip
    for name, head in heads.items():
        write_atomically(place / f"{name}.jsonl", _lines([head]))
    features: list[Row] = []
    activations: list[Row] = []
    drawn = load_sample(materials.run, material.coder)
    with stage("latents", material.code.n_latents, "latents") as progress:
        for latent in range(material.code.n_latents):
            found = _activations(material, latent, drawn.of(latent), model, source)
            activations += [one | by for one in found]
            features.append(
                {
                    "modelId": model, "layer": source, "index": str(latent),
                    "maxActApprox": max((one["maxValue"] for one in found), default=0.0),
                    "frac_nonzero": int(material.counts[latent]) / material.rows,
                    "hasVector": False, "vector": [], "hookName": hook, "neg_str": [],
                    "neg_values": [], "pos_str": [], "pos_values": [], **by,
                }
            )  # fmt: skip
            progress.advance(1)
    for name, rows in (
        ("features", features), ("activations", activations),
        ("explanations", [one | by for one in explained]),
    ):  # fmt: skip
        write_atomically(
            place / name / "batch-0.jsonl.gz", gzip.compress(_lines(rows), compresslevel=5, mtime=0)
        )
    return place


def _explanations(path: Path | None, coder: str, model: str, source: str) -> list[Row]:
    if path is None:
        return []
    found = []
    try:
        for _, one in judged_latents(path):
            if one.coder == coder and one.explanation:
                found.append(
                    {
                        "modelId": model,
                        "layer": source,
                        "index": str(one.latent),
                        "description": one.explanation,
                        "typeName": "bsc",
                        "explanationModelName": path.parent.name,
                        "scores": {k: t.score for k, t in one.tests.items()},
                    }
                )
    except UserError as error:
        raise UserError(
            f"--explanations {path}: expected latents.jsonl of RUN/interp/<judge> ({error})"
        ) from None
    return found


def _activations(material: Material, latent: int, own: Any, model: str, source: str) -> list[Row]:
    """Excerpts around sampled firings, as tokens with their values."""
    texts = material.texts
    rows, margins = material.code.of(latent)
    if len(rows) == 0:
        return []
    binary = latent >= material.first_binary
    borders = np.quantile(margins, np.linspace(0, 1, STRATA + 1))
    found = []
    for stratum in range(STRATA - 1, -1, -1):
        for i in np.flatnonzero(own.stratum == stratum)[:PER_STRATUM]:
            row = int(own.row[i])
            low, high = texts.split_text.around(row)
            here = slice(*np.searchsorted(rows, [low, high]))
            values = np.zeros(high - low)
            values[rows[here].astype(np.int64) - low] = 1.0 if binary else margins[here]
            key = f"{model}/{source}/{latent}/{row}"
            found.append(
                {
                    "id": "c" + hashlib.sha256(key.encode()).hexdigest()[:24],
                    "tokens": texts.split_text.each(low, high), "modelId": model, "layer": source,
                    "index": str(latent), "values": [round(float(v), 4) for v in values],
                    "maxValue": round(float(values.max()), 4),
                    "maxValueTokenIndex": int(values.argmax()),
                    "minValue": round(float(values.min()), 4),
                    "binMin": 0.0 if binary else round(float(borders[stratum]), 4),
                    "binMax": 1.0 if binary else round(float(borders[stratum + 1]), 4),
                    "binContains": 1 / STRATA, "qualifyingTokenIndex": row - low,
                    "dfaValues": [], "lossValues": [],
                }
            )  # fmt: skip
    return found

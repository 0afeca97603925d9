"""Neuronpedia's upload format: JSON lines of a source, its latents, their examples, explanations.

    <model>/<source>/{release,model,sourceset,source}.jsonl
    <model>/<source>/{features,activations,explanations}/batch-0.jsonl.gz

Lines have the columns of its database (schema.prisma, August 2026) and no others; those that need
what bsc does not compute (logits, correlated neurons) are left out. Columns that name rows of other
tables are left out too where these rows may not exist: the type and the model of an explanation,
which stand in its notes with its scores. Examples are the excerpts of all documents, by tenth of a
latent's firings; of a binary latent every firing is 1.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bsc.cache.model.models import load_architecture
from bsc.errors import UserError
from bsc.eval.exports.publish import text_facts
from bsc.eval.figures.examples import STRATA
from bsc.eval.interp.material import Material, Materials
from bsc.eval.interp.scores import judged_latents
from bsc.eval.show import load_sample
from bsc.files import make_folder, write_atomically
from bsc.progress import stage

__all__ = ["write_neuronpedia"]

PER_STRATUM = 2
_LAYERS = ("num_hidden_layers", "n_layer")
_NEURONS = ("intermediate_size", "n_inner", "ffn_dim")
_WHEN = "1970-01-01T00:00:00"
"""The same every time, so that equal inputs give equal bytes."""


Row = dict[str, Any]
"""A line of a file, by field of the format."""


def _lines(rows: Iterable[Row]) -> bytes:
    return "".join(json.dumps(row, sort_keys=True) + "\n" for row in rows).encode()


def write_neuronpedia(
    materials: Materials, material: Material, folder: Path, *, creator: str = "bsc",
    explanations: Path | None = None, repository: str | None = None, model: str | None = None,
) -> Path:  # fmt: skip
    """Write one coder.

    Args:
        materials: of the run.
        material: of the coder.
        folder: a new or empty one.
        creator: id of who publishes it, a user there, and the name that is shown.
        explanations: latents.jsonl of a judge's results, for the explanations and their scores.
        repository: owner/name where `bsc push` put the run, for links to the weights.
        model: where the model is now, for its layers; None: where it was at the capture.

    Returns:
        The folder of the source.

    Raises:
        UserError: the folder is not new, or the explanations cannot be read.
    """
    hook = materials.hookpoint(material.coder)
    saved = materials.store.attributes["model"]
    name = str(saved["name"]).rstrip("/")
    model_id = re.sub(r"[^a-z0-9_-]", "-", name.rpartition("/")[2].lower())
    layer = next((part for part in hook.split(".") if part.isdigit()), "0")
    source_set = material.coder.split("/")[-1]
    source = f"{layer}-{source_set}"
    side = materials.run.config().coder(material.coder).coder.side
    explained = _explanations(explanations, material.coder, model_id, source, creator)
    shape = load_architecture(model or name, revision=saved["revision"])[0].config
    text = text_facts(materials.store.provenance())
    make_folder(folder, "Neuronpedia export")
    place = folder / model_id / source
    for kind in ("features", "activations", "explanations"):
        (place / kind).mkdir(parents=True)
    by = {"creatorId": creator, "createdAt": _WHEN}
    named = {"creatorName": creator}
    links = {}
    if repository is not None:
        links = {"hfRepoId": repository, "hfFolderId": f"coders/{material.coder}"}
    heads: dict[str, Row] = {
        "release": {"name": source_set, "description": material.coder, "descriptionShort":
                    material.coder, "urls": [], **named, "creatorNameShort": creator, **by},
        "model": {"id": model_id, "instruct": False, "displayNameShort": name.rpartition("/")[2],
                  "displayName": name.rpartition("/")[2], "layers": _number(shape, _LAYERS),
                  "neuronsPerLayer": _number(shape, _NEURONS),
                  "owner": name.partition("/")[0] if name.count("/") == 1 else creator, **by},
        "sourceset": {"modelId": model_id, "name": source_set, "releaseName": source_set,
                      "description": material.coder, "visibility": "PUBLIC", "type": hook,
                      "urls": [], **named, **by},
        "source": {"id": source, "modelId": model_id, "setName": source_set, "visibility": "PUBLIC",
                   "num_prompts": len(materials.split_text.starts),
                   "num_tokens_in_prompt": material.texts.length,
                   "dataset": text.get("dataset") or text.get("corpus") or text.get("files", ""),
                   **links, **by},
    }  # fmt: skip
    for kind, head in heads.items():
        write_atomically(place / f"{kind}.jsonl", _lines([head]))
    features: list[Row] = []
    activations: list[Row] = []
    drawn = load_sample(materials.run, material.coder)
    with stage("latents", material.code.n_latents, "latents") as progress:
        for latent in range(material.code.n_latents):
            found = _activations(material, latent, drawn.of(latent), model_id, source)
            activations += [one | by for one in found]
            features.append(
                {
                    "modelId": model_id, "layer": source, "index": str(latent),
                    "sourceSetName": source_set,
                    "maxActApprox": max((one["maxValue"] for one in found), default=0.0),
                    "frac_nonzero": int(material.counts[latent]) / material.rows,
                    "hasVector": False, "vector": [], "hookName": f"{hook}.{side}", "neg_str": [],
                    "neg_values": [], "pos_str": [], "pos_values": [], **by,
                }
            )  # fmt: skip
            progress.advance(1)
    for kind, rows in (
        ("features", features), ("activations", activations), ("explanations", explained),
    ):  # fmt: skip
        write_atomically(
            place / kind / "batch-0.jsonl.gz", gzip.compress(_lines(rows), compresslevel=5, mtime=0)
        )
    return place


def _number(shape: Any, names: Sequence[str]) -> int:
    """A number of a model's config, by the first name that it has; 0 where it has none."""
    of_text = shape.get_text_config()
    found = (getattr(of_text, name, None) for name in names)
    return next((int(value) for value in found if isinstance(value, int)), 0)


def _id(*parts: object) -> str:
    """An id that is the same for equal parts."""
    return "c" + hashlib.sha256("/".join(map(str, parts)).encode()).hexdigest()[:24]


def _explanations(
    path: Path | None, coder: str, model_id: str, source: str, creator: str
) -> list[Row]:
    if path is None:
        return []
    judge, found = path.parent.name, []
    try:
        for _, one in judged_latents(path):
            if one.coder == coder and one.explanation:
                scores = {k: t.score for k, t in one.tests.items() if t.score is not None}
                found.append(
                    {
                        "id": _id(model_id, source, one.latent, judge, one.explanation),
                        "modelId": model_id,
                        "layer": source,
                        "index": str(one.latent),
                        "description": one.explanation,
                        "authorId": creator,
                        "notes": json.dumps({"by": judge, "scores": scores}, sort_keys=True),
                        "createdAt": _WHEN,
                    }
                )
    except UserError as error:
        raise UserError(
            f"--explanations {path}: expected latents.jsonl of RUN/interp/<judge> ({error})"
        ) from None
    return found


def _activations(
    material: Material, latent: int, own: Any, model_id: str, source: str
) -> list[Row]:
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
            found.append(
                {
                    "id": _id(model_id, source, latent, row), "layer": source,
                    "tokens": texts.split_text.each(low, high), "modelId": model_id,
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

"""Tables of latents and of pairs of coders, as scripts: a page that is opened from the file system
can load nothing else."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bsc.eval.browse.neighbours import NONE, Partners
from bsc.eval.browse.pages import CoderPages, visible
from bsc.formats import printable

__all__ = ["latent_table", "pair_table", "script"]

_TOKENS = 5
"""Tokens that the table names of those that a latent fires on, and that it promotes."""


def script(function: str, *values: Any) -> str:
    """A script that calls a function of table.js."""
    words = ",".join(json.dumps(v, allow_nan=False, separators=(",", ":")) for v in values)
    return f"bsc.{function}({words});\n".replace("<", "\\u003c")


def latent_table(pages: CoderPages) -> dict[str, Any]:
    """Columns of the latents of a coder that have a page."""
    shown = pages.latents
    records = [pages.records[i] for i in shown]
    columns = [
        _words(f"explanation by {judge}", [r.explanations.get(judge, "") for r in records])
        for judge in dict.fromkeys(judge for r in records for judge in r.explanations)
    ]
    columns += [
        _words("fires on", [_tokens(pages, i) for i in shown]),
        _numbers("rate", "percent", [r.rate for r in records]),
        _numbers("firings", "count", [r.firings for r in records]),
        _numbers(
            "mean value" if pages.browsed.planned.coder.code == "continuous" else "mean margin",
            "number",
            [
                round(float(pages.facts.mean_margin[r.latent]), 5) if r.firings else None
                for r in records
            ],
        ),
    ]
    columns += [
        _numbers(kind, "number", [r.scores.get(kind) for r in records])
        for kind in dict.fromkeys(kind for r in records for kind in r.scores)
    ]
    near = pages.near_decoder
    columns.append(_numbers("nearest, cosine", "number", _of(near.latent, near.likeness, shown)))
    for partner in pages.partners[:1]:
        forth = partner.forth
        columns += [
            _numbers("partner, cosine", "number", _of(forth.latent, forth.cosine, shown)),
            _numbers("partner, Jaccard", "number", _of(forth.latent, forth.jaccard, shown)),
        ]
    if any(r.diagnosis for r in records):
        columns.append(_words("what it is", [r.diagnosis or "" for r in records]))
    if pages.effects is not None:
        promoted = pages.effects.promoted[:, :_TOKENS].tolist()
        told = [" ".join(visible(pages.text.token(t)) for t in promoted[i]) for i in shown]
        columns.append(_words("promotes", told))
    return {"latents": shown, "rows": pages.rows, "columns": columns}


def _tokens(pages: CoderPages, latent: int) -> str:
    return " ".join(token for token, _, _ in pages.tokens(latent)[:_TOKENS])


def _numbers(name: str, kind: str, values: Sequence[float | None]) -> dict[str, Any]:
    return {"name": name, "kind": kind, "values": values}


def _words(name: str, values: Sequence[str]) -> dict[str, Any]:
    return {
        "name": name,
        "kind": "words",
        "values": [printable(" ".join(v.split())) for v in values],
    }


def _of(latent: Any, likeness: Any, shown: Sequence[int]) -> list[float | None]:
    """Likeness to the first of some latents, where there is one."""
    first, best = (a if a.ndim == 1 else a[:, 0] for a in (latent, likeness))
    return [
        None if n == NONE else round(float(x), 4)
        for n, x in zip(first[shown].tolist(), best[shown].tolist(), strict=True)
    ]


def pair_table(names: Sequence[str], forth: Partners) -> Mapping[str, Any]:
    """The partners of all latents of a coder in another.

    Args:
        names: folders of the one and of the other.
        forth: from the one to the other.
    """
    return {
        "a": names[0],
        "b": names[1],
        "latent": forth.latent.tolist(),
        "cosine": np.round(forth.cosine.astype(np.float64), 4).tolist(),
        "jaccard": np.round(forth.jaccard.astype(np.float64), 4).tolist(),
        "mutual": forth.mutual.astype(int).tolist(),
    }

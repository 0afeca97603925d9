"""Scores of latents from a file, such as those of an auto-interpretation."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bsc.errors import UserError, nearest
from bsc.records import parse_json

__all__ = ["read_scores", "read_table"]


def read_table(source: str, option: str, fields: str) -> list[dict[str, Any]]:
    """Rows of a CSV file with a header or of a JSONL file.

    Args:
        source: path of the file; .csv, or anything else for JSONL.
        option: that named it, for the message.
        fields: that it should have, for the message.

    Raises:
        UserError: it cannot be read.
    """
    path = Path(source).expanduser()
    try:
        with path.open(encoding="utf-8", newline="") as file:
            if path.suffix.lower() == ".csv":
                return list(csv.DictReader(file))
            return [parse_json(line) for line in file if line.strip()]
    except (OSError, ValueError, csv.Error, RecursionError) as error:
        raise UserError(
            f"{option} {source}: cannot be read ({error}). Expected a .csv or .jsonl file with the "
            f"fields {fields}."
        ) from None


def read_scores(source: str, n_latents: Mapping[str, int]) -> dict[str, NDArray[np.float64]] | None:
    """Scores by coder, (F,), NaN where a latent has none.

    Args:
        source: ``"rate"``, for which None comes back, or a CSV file with a header or a JSONL file
            with the fields `coder`, `latent` and `score`.
        n_latents: of each coder.

    Raises:
        UserError: there is no such file, or a line names no latent of these coders.
    """
    if source == "rate":
        return None
    rows = read_table(source, "--ablation-score", "coder, latent and score")
    scores = {name: np.full(n, np.nan) for name, n in n_latents.items()}
    for number, row in enumerate(rows, 1):
        try:
            name, latent, score = str(row["coder"]), int(row["latent"]), float(row["score"])
            if not math.isfinite(score):
                raise ValueError(f"score {score} is not finite")
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise UserError(
                f"--ablation-score {source}, entry {number}: needs coder, latent and score "
                f"({error!r})."
            ) from None
        if name not in scores:
            raise UserError(
                f"--ablation-score {source}, entry {number}: no coder {name!r}"
                f"{nearest(name, scores)}."
            )
        if not 0 <= latent < n_latents[name]:
            raise UserError(
                f"--ablation-score {source}, entry {number}: coder {name} has no latent {latent}; "
                f"they are 0 to {n_latents[name] - 1}."
            )
        scores[name][latent] = score
    return scores

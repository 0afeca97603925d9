"""Latents of a coder one by one: what an evaluation and its interpretation know of each."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bsc.errors import UserError
from bsc.eval.evaluation import EvaluationFolder
from bsc.eval.figures.firing import firing_counts
from bsc.eval.figures.scores import read_table
from bsc.eval.interp.scores import InterpFolder, judged_latents
from bsc.eval.passes.codes import Codes
from bsc.eval.passes.pieces import Pieces
from bsc.eval.show import LatentContext, contexts_of, held_out_text, load_sample
from bsc.formats import printable
from bsc.train.run import Run, as_run
from bsc.typed import Record

__all__ = ["LatentRecord", "latents"]

_OFFLINE = ("predictability", "overlap")


class LatentRecord(Record):
    """One latent."""

    coder: str
    latent: int
    firings: int
    """Held-out rows in which it fired."""
    rate: float
    """Their share."""
    diagnosis: str | None
    """What it is, in words, where it fires on more than 10 % of the rows."""
    explanations: dict[str, str]
    """By judge."""
    scores: dict[str, float]
    """``"predictability"``, ``"overlap"``, and ``"<judge>/<test>"``."""
    contexts: list[LatentContext]

    def __repr__(self) -> str:
        known = [f"{name} {score:.2f}" for name, score in self.scores.items()]
        words = ", ".join([f"{self.firings:,} firings", *known, *self.explanations.values()])
        return f"<latent {self.latent} of {self.coder}: {printable(words)}>"


def latents(
    run: Run | str | Path,
    coder: str,
    *,
    contexts: int = 0,
    store: str | Path | None = None,
    model: str | None = None,
) -> Iterator[LatentRecord]:
    """Every latent of an evaluated coder, in order, dead ones too.

    `[one.to_json() for one in latents(...)]` is a table for whatever takes a list of dictionaries.

    Args:
        run: an evaluated run, or its folder.
        coder: name of the coder, or a part of it that no other has.
        contexts: of each tenth of a latent's firings at most; with any the store, its tokenizer and
            the codes of the evaluation are needed, and the code is held in memory.
        store: where the store is now; None: where it was in training.
        model: where the model is now, for its tokenizer; None: where it was at the capture.

    Raises:
        UserError: the run was not evaluated, has no such coder, or a file is missing or damaged.
    """
    opened = as_run(run)
    name = opened.full_name(coder)
    evaluation = EvaluationFolder(opened).read()
    if name not in evaluation.coders:
        raise UserError(f"{opened.folder}: {name} turned non-finite, so it has no figures.")
    figures, counts = evaluation.coders[name], firing_counts(opened, name)
    diagnoses = {one.latent: one.what for one in figures.ultra}
    explanations, scores = _interpreted(opened, name)
    shown = _Contexts(opened, name, counts, contexts, store, model) if contexts else None
    return (
        LatentRecord(
            coder=name,
            latent=latent,
            firings=firings,
            rate=firings / figures.rows,
            diagnosis=diagnoses.get(latent),
            explanations=explanations.get(latent, {}),
            scores=scores.get(latent, {}),
            contexts=shown.of(latent) if shown else [],
        )
        for latent, firings in enumerate(counts.tolist())
    )


class _Contexts:
    """Where the latents of a coder fire."""

    def __init__(
        self, run: Run, name: str, counts: NDArray[np.int64], n: int, store: Any, model: str | None
    ) -> None:
        self.n, self.sample = n, load_sample(run, name)
        self.text = held_out_text(run, store, model)
        self.code = Codes(Pieces(EvaluationFolder(run).codes(name)), counts).by_latent()

    def of(self, latent: int) -> list[LatentContext]:
        """Of one latent, the strongest first."""
        return contexts_of(self.sample.of(latent), self.n, self.text, self.code.of(latent))


def _interpreted(
    run: Run, name: str
) -> tuple[dict[int, dict[str, str]], dict[int, dict[str, float]]]:
    """Explanations by judge, and scores, of the latents that have any."""
    folder = InterpFolder(run)
    explanations: dict[int, dict[str, str]] = {}
    scores: dict[int, dict[str, float]] = {}
    if folder.read_offline() is not None:
        for kind in _OFFLINE:
            path = folder.offline / f"scores-{kind}.csv"
            for row in read_table(str(path), "scores", "coder, latent and score"):
                if row["coder"] == name:
                    scores.setdefault(int(row["latent"]), {})[kind] = float(row["score"])
    for judge in folder.judged():
        for _, one in judged_latents(judge / "latents.jsonl"):
            if one.coder != name:
                continue
            if one.explanation is not None:
                explanations.setdefault(one.latent, {})[judge.name] = one.explanation
            for test, found in one.tests.items():
                if found.score is not None:
                    scores.setdefault(one.latent, {})[f"{judge.name}/{test}"] = found.score
    return explanations, scores

"""What the scoring of a run works with: of each coder the latents that were drawn, their excerpts
and their firings, from what `bsc eval` left on disk. No model is needed, only its tokenizer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bsc.cache.model.models import load_tokenizer
from bsc.errors import StoreError, UserError
from bsc.eval.evaluation import Evaluation, EvaluationFolder
from bsc.eval.figures.firing import firing_counts
from bsc.eval.figures.split_text import SplitText
from bsc.eval.interp.config import InterpConfig
from bsc.eval.interp.evidence import Evidence, Texts, gather
from bsc.eval.interp.sampling import Chosen, Design, choose
from bsc.eval.passes.batches import rows_read
from bsc.eval.passes.codes import Codes, LatentCode
from bsc.eval.passes.pieces import Pieces
from bsc.eval.passes.setting import open_store
from bsc.train.run import Run

__all__ = ["Material", "Materials"]


@dataclass(frozen=True)
class Material:
    """What the scoring of one coder works with."""

    coder: str
    code: LatentCode
    counts: NDArray[np.int64]
    """(F,) firings of each latent."""
    rows: int
    """Rows that were evaluated."""
    chosen: Chosen
    texts: Texts
    first_binary: int
    """Latents from this one on are binary."""
    config: InterpConfig
    _gathered: dict[int, Evidence] = field(default_factory=dict)

    def evidence(self, latent: int) -> Evidence:
        """Excerpts of a latent."""
        if latent in self._gathered:
            return self._gathered[latent]
        row, value = self.code.of(latent)
        config = self.config
        found = self._gathered[latent] = gather(
            self.texts,
            latent,
            row.astype(np.int64),
            value,
            explain=config.explain_excerpts,
            test=config.test_excerpts,
            marking=config.marks,
            graded=latent < self.first_binary,
            negatives=config.negatives,
        )
        return found


class Materials:
    """Materials of all coders, made one by one."""

    def __init__(
        self, run: Run, config: InterpConfig, *, store: str | Path | None, model: str | None
    ) -> None:
        """Open the store and the tokenizer.

        Args:
            run: an evaluated run.
            config: which latents, and what is shown of them.
            store: where the store is now; None: where it was in training.
            model: where the model is now, for its tokenizer; None: where it was at the capture.

        Raises:
            UserError: the run is not evaluated, the store is not there, or there is no such coder
                or latent.
        """
        evaluation = EvaluationFolder(run).read()
        self.run, self.config = run, config
        self.every_name = run.coder_names()
        self.names = _names(run, config.coders, evaluation)
        self._planned = {c.name: c for c in run.config().coders}
        for name in self.names:
            width = self._planned[name].coder.n_latents
            if wrong := [i for i in config.only if not 0 <= i < width]:
                raise UserError(f"{name}: no latent {wrong[0]}; they are 0 to {width - 1}.")
        self.store = open_store(run, store)
        saved = self.store.attributes["model"]
        tokenizer = load_tokenizer(model or str(saved["name"]), saved["revision"])
        split = self.store.held_out
        self.split_text = SplitText(split, tokenizer)
        without = tuple(run.config().without_tokens)
        hooks = dict.fromkeys(self.hookpoint(n) for n in self.names)
        max_rows = evaluation.config.rows
        length = min(config.excerpt_tokens, self.store.context)
        self.read = {h: rows_read(split, h, max_rows, without) for h in hooks}
        self._texts = {
            h: Texts(self.split_text, r, length=length, seed=config.seed)
            for h, r in self.read.items()
        }

    def hookpoint(self, name: str) -> str:
        """Hookpoint of a coder."""
        return self._planned[name].hookpoint

    def identity(self, name: str) -> dict[str, Any]:
        """What the codes of a coder belong to."""
        path = EvaluationFolder(self.run).codes(name) / "identity.json"
        try:
            return {"codes": path.read_text(), "seed": self.config.seed}
        except OSError as error:
            raise StoreError(
                f"{path}: cannot be read ({error}). `bsc eval {self.run.folder}` writes it."
            ) from None

    def __iter__(self) -> Iterator[Material]:
        return map(self.of, self.names)

    def of(self, name: str) -> Material:
        """Read the codes of a coder and draw its latents."""
        counts = firing_counts(self.run, name)
        code = Codes(Pieces(EvaluationFolder(self.run).codes(name)), counts).by_latent()
        texts, config = self._texts[self.hookpoint(name)], self.config
        rows = int(texts.read.sum())
        chosen = (
            _just(config.only, counts)
            if config.only
            else choose(
                counts,
                config.latents,
                census=config.census_rate * rows,
                min_firings=config.min_firings,
                seed=config.seed,
            )
        )
        first_binary = self._planned[name].coder.first_binary
        return Material(name, code, counts, rows, chosen, texts, first_binary, config)


def _just(latents: Sequence[int], counts: NDArray[np.int64]) -> Chosen:
    """The latents that were asked for, as a population of their own."""
    which = np.unique(np.array(latents, np.int64))
    every = np.ones(len(which), bool)
    size = np.maximum(counts[which], 1).astype(np.float64)
    return Chosen(
        Design(which, np.ones(len(which)), every, len(which), 0.0),
        Design(which, size, every, len(which), 0.0),
    )


def _names(run: Run, wanted: Sequence[str], evaluation: Evaluation) -> list[str]:
    for one in wanted:
        if not any(name in evaluation.coders for name in run.names_of([one])):
            raise UserError(
                f"{run.folder}: {one} was left out of the evaluation, so there is nothing to score."
            )
    return [name for name in run.names_of(wanted) if name in evaluation.coders]

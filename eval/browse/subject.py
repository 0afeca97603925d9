"""What is browsed: coders of evaluated runs, their codes, samples and texts."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from bsc.cache.model.models import LanguageModel
from bsc.devices import pick_device
from bsc.errors import UserError
from bsc.eval.browse.config import BrowseConfig
from bsc.eval.browse.contexts import ContextPages
from bsc.eval.evaluation import CoderFigures, EvaluationFolder
from bsc.eval.figures.examples import Sample, choose_latents
from bsc.eval.figures.firing import firing_counts
from bsc.eval.figures.split_text import SplitText
from bsc.eval.figures.stability import comparable_pairs
from bsc.eval.latent_table import LatentRecord, latents
from bsc.eval.measured_rows import measured_rows
from bsc.eval.passes.batches import rows_read
from bsc.eval.passes.codes import Codes, LatentCode
from bsc.eval.passes.pieces import Pieces
from bsc.eval.passes.setting import matching_model, open_store
from bsc.eval.report.coders import run_labels
from bsc.eval.report.links import coder_slug
from bsc.eval.show import load_sample
from bsc.formats import printable
from bsc.train.coders.naming import names_of
from bsc.train.run import Run
from bsc.train.run_config import RunCoder

__all__ = ["BrowsedCoder", "BrowsedRun", "Subject", "open_subject"]

_CODES_HELD = 3
"""Codes that are held in memory, sorted by latent."""
PARTNERS = 3
"""Coders that the latents of one are compared with at most."""


class BrowsedRun:
    """An evaluated run with its text and its model."""

    def __init__(
        self, run: Run, label: str, store: Any, model: str | None, device: str | None
    ) -> None:
        self.run, self.label = run, label
        self.evaluation = EvaluationFolder(run).read()
        self.store = open_store(run, store)
        self.config = run.config()
        self._model_name, self._device = model, device

    @cached_property
    def lm(self) -> LanguageModel:
        """The model of the capture, with its head."""
        return matching_model(self.store, self._model_name, pick_device(self._device))

    @cached_property
    def text(self) -> SplitText:
        """The text of the held-out rows."""
        return SplitText(self.store.held_out, self.lm.tokenizer)

    @cached_property
    def contexts(self) -> ContextPages:
        """Contexts in that text, all of them ready."""
        found = ContextPages(self.text)
        found.prepare()
        return found

    def read(self, hookpoint: str) -> NDArray[np.bool_]:
        """(rows,) which held-out rows were evaluated at a hookpoint."""
        without = tuple(self.config.without_tokens)
        return rows_read(self.store.held_out, hookpoint, self.evaluation.config.rows, without)


@dataclass(frozen=True)
class BrowsedCoder:
    """One coder of a run."""

    of: BrowsedRun
    planned: RunCoder
    slug: str
    """Name of its folder."""
    title: str

    @property
    def name(self) -> str:
        """Its name in its run."""
        return self.planned.name

    @property
    def figures(self) -> CoderFigures:
        """What was measured of it."""
        return self.of.evaluation.coders[self.name]

    @property
    def first_binary(self) -> int:
        """Latents from this one on have no value."""
        return self.planned.coder.first_binary

    @cached_property
    def counts(self) -> NDArray[np.int64]:
        """(F,) firings of each latent."""
        return firing_counts(self.of.run, self.name)

    def read_sample(self) -> Sample:
        """Firings that were drawn."""
        return load_sample(self.of.run, self.name)

    def read_decoder(self) -> Tensor:
        """Its decoder rows, (F, d_out)."""
        return self.of.run.coder(self.name).W_dec.detach().cpu()

    def read_records(self) -> list[LatentRecord]:
        """What is known of each latent."""
        return list(latents(self.of.run, self.name))

    def read_code(self) -> LatentCode:
        """Read its code and sort it by latent."""
        folder = EvaluationFolder(self.of.run)
        return Codes(Pieces(folder.codes(self.name)), self.counts).by_latent()

    def shown(self, latents_shown: int | None) -> list[int]:
        """Latents that get a page, ascending."""
        if latents_shown is None or latents_shown >= len(self.counts):
            return list(range(len(self.counts)))
        return sorted(choose_latents(self.counts, latents_shown))


@dataclass
class Subject:
    """Coders that are browsed, and which of them are compared."""

    coders: list[BrowsedCoder]
    pairs: list[tuple[int, int]]
    """Of indices into `coders`."""
    _codes: OrderedDict[str, LatentCode] = field(default_factory=OrderedDict)

    def code(self, coder: BrowsedCoder) -> LatentCode:
        """The code of a coder; the last few are kept."""
        if coder.slug not in self._codes:
            while len(self._codes) >= _CODES_HELD:
                self._codes.popitem(last=False)
            self._codes[coder.slug] = coder.read_code()
        self._codes.move_to_end(coder.slug)
        return self._codes[coder.slug]

    def partners(self, coder: BrowsedCoder) -> list[BrowsedCoder]:
        """Coders whose latents this one's are compared with."""
        at = self.coders.index(coder)
        return [
            self.coders[b if a == at else a] for a, b in self.pairs if at in (a, b)
        ]  # fmt: skip


def open_subject(
    runs: Sequence[Run],
    config: BrowseConfig,
    store: str | Path | None,
    model: str | None,
    device: str | None = None,
) -> Subject:
    """Open runs and choose coders.

    Raises:
        UserError: a run is not evaluated, or its store or model is not there; or no coder has such
            a name.
    """
    opened = [
        BrowsedRun(run, label, store, model, device)
        for run, label in zip(runs, run_labels(runs), strict=True)
    ]
    several = len(opened) > 1
    every = [(one, planned) for one in opened for planned in one.config.coders]
    names = list(dict.fromkeys(planned.name for _, planned in every))
    wanted = names_of(config.coders, names, ", ".join(str(run.folder) for run in runs))
    coders: list[BrowsedCoder] = []
    for one, planned in every:
        if planned.name in one.evaluation.coders and planned.name in wanted:
            slug = coder_slug(planned.name, one.label if several else "")
            title = f"{planned.name}, {one.label}" if several else planned.name
            coders.append(BrowsedCoder(one, planned, slug, printable(title)))
    if not coders:
        raise UserError("there is no evaluated coder to show.")
    return Subject(coders, list(_pairs(coders)))


def _pairs(coders: Sequence[BrowsedCoder]) -> Iterator[tuple[int, int]]:
    """Coders of one name in several runs; of one run those that differ in code, or in seed."""
    taken = dict.fromkeys(range(len(coders)), 0)
    candidates = [
        (i, j) for i, a in enumerate(coders) for j, b in enumerate(coders[:i]) if a.name == b.name
    ]
    for label in dict.fromkeys(c.of.label for c in coders):
        own = {c.name: i for i, c in enumerate(coders) if c.of.label == label}
        found = comparable_pairs([coders[i].planned for i in own.values()])
        for wanted in ("code", "seed"):
            candidates += [(own[a], own[b]) for differs, a, b in found if differs == wanted]
    for first, second in candidates:
        if max(taken[first], taken[second]) < PARTNERS and _same_rows(
            coders[first], coders[second]
        ):
            taken[first] += 1
            taken[second] += 1
            yield first, second


def _same_rows(a: BrowsedCoder, b: BrowsedCoder) -> bool:
    """Whether two coders reconstruct the same thing, and were evaluated on the same rows."""
    facts = [(c.planned.hookpoint, measured_rows(c.of.config, c.of.evaluation)) for c in (a, b)]
    return facts[0] == facts[1]

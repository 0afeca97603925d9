"""What the report shows of each coder: its config, figures, training metrics and examples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from bsc.errors import StoreError, UserError
from bsc.eval.evaluation import CoderFigures, EvaluationFolder, ShownLatent
from bsc.eval.measured_rows import MeasuredRows, measured_rows
from bsc.eval.report.links import coder_slug
from bsc.files import canonical_json
from bsc.records import expected_form
from bsc.train.run import Run
from bsc.train.run_config import FinetunedCoder, PlannedCoder, RunCoder, RunConfig

__all__ = ["CurvePoint", "ReportedCoder", "by_panel", "read_coders", "run_labels"]

ALL_CURVE_POINTS = 4_000
"""Points of the training curves of all coders together."""


class CurvePoint(NamedTuple):
    """A training figure."""

    rows: int
    fvu: float


@dataclass(frozen=True)
class ReportedCoder:
    """One coder."""

    run: str
    """What its run is called on the page."""
    planned: RunCoder
    anchor: str
    """Its id on the page."""
    slug: str
    """Name of its folder in a browser."""
    model: str
    """Which model, where it is not the trained one; else empty."""
    rows: str
    """Whose rows it was measured on, where the page has several; else empty."""
    figures: CoderFigures
    curve: list[CurvePoint]
    """Training FVU, thinned."""
    examples: list[ShownLatent]

    @property
    def name(self) -> str:
        """Its name in its run."""
        return self.planned.name

    @property
    def code(self) -> str:
        """``"binary"``, ``"continuous"`` or ``"hybrid"``."""
        return self.planned.coder.code

    @property
    def k(self) -> int:
        """Selected latents."""
        return self.planned.coder.k

    @property
    def trained_here(self) -> bool:
        """Whether its training is known."""
        return isinstance(self.planned, (PlannedCoder, FinetunedCoder))

    @property
    def seed(self) -> int:
        """Seed of its initial weights."""
        return self.planned.seed

    @property
    def folder(self) -> str:
        """Folder of its weights."""
        return f"{self.run}/coders/{self.name}"

    @property
    def label(self) -> str:
        """Short name within a panel."""
        return f"{self.code}, k = {self.k}"

    @property
    def panel(self) -> str:
        """What the coders of one panel share."""
        coder = self.planned.coder
        words = [self.planned.hookpoint, coder.site.replace("_", " ")]
        words.append(f"{coder.n_latents:,} latents")
        if isinstance(self.planned, FinetunedCoder):
            words.append("finetuned")
        return ", ".join([*words, *filter(None, (self.model, self.rows))])

    @property
    def variant(self) -> str:
        """What coders share that differ in k and seed alone: they are one line of a plot."""
        varying = {"name", "seed", "k_init", "lr", "coder", "parent", "parent_xxh3_128"}
        own = self.planned.model_dump(exclude=varying)
        coder = self.planned.coder.model_dump(exclude={"k", "k_binary"})
        # Learning rates that follow from k by a rule are no other variant; a sweep names it.
        named = self.name.split(f"-s{self.seed}")[-1]
        return self.run + canonical_json([own, coder, named])


def by_panel(rows: Sequence[ReportedCoder]) -> dict[str, list[ReportedCoder]]:
    """Rows grouped by hookpoint, site and width."""
    grouped: dict[str, list[ReportedCoder]] = {}
    for row in rows:
        grouped.setdefault(row.panel, []).append(row)
    return grouped


def run_labels(runs: Sequence[Run]) -> list[str]:
    """What runs are called on a page: the folder's name, with the folders above where names repeat.

    >>> from pathlib import Path
    >>> run_labels([Run(Path("a/run")), Run(Path("b/run")), Run(Path("b/other"))])
    ['a/run', 'b/run', 'other']
    """
    parts = [run.folder.resolve().parts for run in runs]
    labels = []
    for own in parts:
        depth = 1
        while depth < len(own) and sum(p[-depth:] == own[-depth:] for p in parts) > 1:
            depth += 1
        labels.append("/".join(own[-depth:]))
    return labels


def read_coders(runs: Sequence[Run]) -> list[ReportedCoder]:
    """The coders of evaluated runs, in the order of the page.

    Raises:
        UserError: a run is not evaluated, its files do not fit together, or there is no coder.
    """
    found: list[ReportedCoder] = []
    points = max(20, ALL_CURVE_POINTS // sum(len(run.coder_names()) for run in runs))
    labels = run_labels(runs)
    rows = _rows(runs, labels)
    for run, label in zip(runs, labels, strict=True):
        found += _coders_of(run, label, points, rows[label], several=len(runs) > 1)
    if not found:
        raise UserError("a report needs at least one coder; every coder of these was left out.")
    found.sort(key=_order)
    return [replace(coder, anchor=f"coder-{i}") for i, coder in enumerate(found, 1)]


def _rows(runs: Sequence[Run], labels: Sequence[str]) -> dict[str, str]:
    """By run the first one that was measured on the same rows; nothing where all were."""
    first: dict[MeasuredRows, str] = {}
    of = {}
    for run, label in zip(runs, labels, strict=True):
        rows = of[label] = measured_rows(run.config(), EvaluationFolder(run).read())
        if rows.rows:  # else every coder was left out
            first.setdefault(rows, f"rows of {label}")
    return {label: first.get(rows, "") if len(first) > 1 else "" for label, rows in of.items()}


def _order(one: ReportedCoder) -> tuple[str | int, ...]:
    coder = one.planned.coder
    return (
        one.model,
        one.rows,
        one.planned.hookpoint,
        coder.site,
        coder.n_latents,
        coder.code,
        coder.k,
        one.seed,
        one.run,
        one.name,
    )


def _coders_of(
    run: Run, label: str, points: int, rows: str, *, several: bool
) -> list[ReportedCoder]:
    folder, config = EvaluationFolder(run), run.config()
    evaluation, examples = folder.read(), folder.read_examples()
    curves = {}
    if config.steps and config.log_every:  # else its coders were trained elsewhere
        curves = _curves(run, config.steps, config.log_every, points)
    found = []
    for planned in config.coders:
        if planned.name in evaluation.left_out:
            continue
        if planned.name not in evaluation.coders:
            raise StoreError(
                f"{run.eval_path}: no figures of coder {planned.name}. {folder.remedy}"
            )
        one = ReportedCoder(
            run=label,
            planned=planned,
            anchor="",
            slug=coder_slug(planned.name, label if several else ""),
            model=_untrained(config),
            rows=rows,
            figures=evaluation.coders[planned.name],
            curve=curves.get(planned.name, []),
            examples=examples.get(planned.name, []),
        )
        found.append(one)
    return found


def _untrained(config: RunConfig) -> str:
    seed = config.model.get("random_weights")
    return "" if seed is None else f"untrained model (seed {seed})"


def _curves(run: Run, steps: int, log_every: int, points: int) -> dict[str, list[CurvePoint]]:
    """Lines of metrics.jsonl by coder, thinned to about `points` each."""
    keep = max(1, steps // log_every // points)
    curves: dict[str, list[CurvePoint]] = {}
    with expected_form(str(run.metrics_path), f"Train the run again, or resume it: {run.folder}."):
        for line in run.metrics():
            if line["step"] // log_every % keep == 0 or line["step"] == steps:
                point = CurvePoint(int(line["rows"]), float(line["fvu"]))
                curves.setdefault(line["coder"], []).append(point)
    return curves

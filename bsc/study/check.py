"""Seeing that claims speak of coders and figures that a study will have, before it runs.

Coders are known from the sweeps alone (bsc/study/amounts.py). What is only known in the end, such
as a learning rate that is chosen on the way, is not checked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from bsc.errors import ConfigError
from bsc.eval.figures.firing import FREQUENT
from bsc.study.commands import inputs_of
from bsc.study.config import Contrast, StudyStep
from bsc.study.contrasts import check_contrast
from bsc.study.needs import OFFLINE, scoring_of, sides_of
from bsc.study.study import OpenedStudy
from bsc.study.subjects import Subject, selected
from bsc.train.run_config import PlannedCoder

__all__ = ["check_claims"]


def check_claims(opened: OpenedStudy, coders: Mapping[str, Sequence[PlannedCoder]]) -> None:
    """See that every claim can be decided once all steps are done.

    Args:
        opened: the study.
        coders: of every run, by its step.

    Raises:
        ConfigError: a field or a coder is not there, or a figure is not measured.
    """
    steps = {name: node.step for name, node in opened.nodes.items()}
    measured = {s.fields["run"]: s for s in steps.values() if s.command == "eval"}
    subjects = [
        Subject(
            opened.folder.run(run), c.name, c.coder.model_dump() | c.model_dump() | {"run": run}
        )
        for run in measured
        for c in coders[run]
    ]
    for claim in opened.study.claims:
        for number, part in enumerate(claim.parts, 1):
            where = f"{opened.file}: claim {claim.id}, part {number}"
            _check_one(part, where, subjects, steps, measured)
            for variant in part.variants:
                other = part.changed(variant)
                _check_one(other, f"{where}, {variant.words!r}", subjects, steps, measured)


def _check_one(
    contrast: Contrast,
    where: str,
    subjects: Sequence[Subject],
    steps: Mapping[str, StudyStep],
    measured: Mapping[str, StudyStep],
) -> None:
    sides = list(sides_of(contrast))
    for side in sides:
        for run in side.runs:
            if run not in measured:
                raise ConfigError(
                    f"{where}: run = {run!r} is not measured. Add a step: [eval.NAME] with "
                    f"run = {run!r}."
                )
    chosen = {
        steps[name].fields["field"]
        for step in steps.values()
        for key, name in inputs_of(step)
        if key == "chosen"
    }
    if not any(field in side.coders for side in sides for field in chosen):
        check_contrast(contrast, subjects, where)
    for side in sides:
        known = {n: v for n, v in side.coders.items() if n not in chosen}
        runs = {str(s.fields["run"]) for s in selected(subjects, known, where)}
        for run in sorted(runs):
            _check_measured(side.figure, side.judge, run, where, steps, measured[run])


def _check_measured(
    figure: str,
    judge: str | None,
    run: str,
    where: str,
    steps: Mapping[str, StudyStep],
    evaluation: StudyStep,
) -> None:
    """See that a figure will be there for the coders of a run."""
    name, _, word = figure.partition(":")
    scoring = scoring_of(evaluation.name, steps)
    if name in OFFLINE and not scoring:
        raise ConfigError(
            f"{where}: {figure}: {run} is not scored. Add a step: [interp.NAME] with "
            f"run = {evaluation.name!r}."
        )
    if name == "judge":
        judges = [s.name for s in scoring if s.fields.get("judge")]
        if (judge is None and len(judges) != 1) or (judge is not None and judge not in judges):
            raise ConfigError(
                f"{where}: {figure}: judge: should be a step of interp that asks a judge about "
                f"{run}: {', '.join(judges) or 'there is none'}."
            )
    if name == "probe" and evaluation.fields.get("no_probe"):
        raise ConfigError(f"{where}: {figure}: [eval.{evaluation.name}] has no_probe.")
    if name in ("latents_above", "share_of_firings_above") and word not in map(str, FREQUENT):
        raise ConfigError(f"{where}: {figure}: counted are {', '.join(map(str, FREQUENT))}.")

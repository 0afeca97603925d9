"""What a claim needs: the steps that measure its figures on the coders that it speaks of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from bsc.study.config import Claim, Contrast, StudyStep

__all__ = ["OFFLINE", "Side", "runs_of", "scoring_of", "sides_of", "steps_of"]

OFFLINE = ("predictability", "overlap")
"""Scores of latents that every step of `interp` gives, with a judge or without one."""


class Side(NamedTuple):
    """One side of a contrast."""

    coders: Mapping[str, Any]
    """Fields of its coders."""
    figure: str
    judge: str | None

    @property
    def runs(self) -> list[str]:
        """Steps whose runs it names; empty: it is of all runs that are measured."""
        runs = self.coders.get("run", [])
        return [runs] if isinstance(runs, str) else list(runs)


def sides_of(contrast: Contrast) -> Iterator[Side]:
    """Coders of each side of a contrast, with their figure and their judge."""
    yield Side(contrast.coders, contrast.figure, contrast.judge)
    if contrast.against is not None:
        figure = contrast.against_figure or contrast.figure
        yield Side(contrast.against, figure, contrast.against_judge or contrast.judge)


def _sides(claim: Claim) -> Iterator[Side]:
    for part in claim.parts:
        for contrast in (part, *(part.changed(v) for v in part.variants)):
            yield from sides_of(contrast)


def runs_of(claim: Claim) -> set[str]:
    """Steps whose runs a claim names."""
    return {run for side in _sides(claim) for run in side.runs}


def steps_of(claim: Claim, steps: Mapping[str, StudyStep]) -> list[str]:
    """Names of the steps of `eval` and `interp` that a claim and its variants need, in the order of
    `steps`. What these need in their turn is not among them.

    Args:
        claim: of the study.
        steps: of the study, by name.
    """
    evaluations = {str(s.fields["run"]): s.name for s in steps.values() if s.command == "eval"}
    found: set[str] = set()
    for side in _sides(claim):
        for run in side.runs or evaluations:
            if run in evaluations:
                found.add(evaluations[run])
                found.update(_scoring(side, evaluations[run], steps))
    return [name for name in steps if name in found]


def _scoring(side: Side, evaluation: str, steps: Mapping[str, StudyStep]) -> list[str]:
    """Steps that score latents of a run, of those that the figure of a side is from."""
    scoring = scoring_of(evaluation, steps)
    judged = [s.name for s in scoring if s.fields.get("judge")]
    name = side.figure.partition(":")[0]
    if name == "judge":
        return [s for s in judged if side.judge in (None, s)]
    if name in OFFLINE:
        return ([s.name for s in scoring if s.name not in judged] or judged)[:1]
    return []


def scoring_of(evaluation: str, steps: Mapping[str, StudyStep]) -> list[StudyStep]:
    """Steps that score the latents of a run, with a judge or without one.

    Args:
        evaluation: name of the step that evaluated the run.
        steps: of the study, by name.
    """
    return [s for s in steps.values() if s.command == "interp" and s.fields["run"] == evaluation]

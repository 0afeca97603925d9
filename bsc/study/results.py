"""What came of a study: every claim with its estimates and its verdict, as in study.json."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import Field

from bsc.errors import UserError
from bsc.eval.evaluation import Interval
from bsc.study.config import Bound, Claim, Part
from bsc.study.contrasts import Cell, cells_of
from bsc.study.estimates import Estimate, decide, resolution
from bsc.study.measures import Measures, units_of
from bsc.study.subjects import Subject, text_of, words_of
from bsc.typed import Record

__all__ = ["STUDY_VERSION", "ClaimResult", "Done", "PartResult", "Shown", "StudyResult",
           "VariantResult", "claim_result", "rule_of"]  # fmt: skip

STUDY_VERSION = 1
NOT_MEASURED = "not measured"


class Shown(Record):
    """One estimate."""

    where: dict[str, str]
    """Values of the fields that it is of, such as k."""
    value: float | None
    """Difference, ratio or figure; None: no coder has it."""
    interval: Interval
    """95 %, over seeds and units."""
    first: float | None
    """Mean figure of the coders."""
    against: float | None
    """Mean figure of what they stand beside."""
    decides: float | None
    """How far from its bound an effect has to be to be decided in four studies of five; of a ratio
    as a factor."""
    seeds: int
    units: int
    """Documents or classes."""
    error_seeds: float
    error_units: float
    pairs: int
    left_out: int
    """Pairs without the figure, or without a partner, in some seed: the cell is not decided."""
    outside: int = 0
    """Pairs of an interpolation that are outside of what it is between."""
    coders: list[list[str]]
    """RUN:NAME of each coder and of what it stands beside."""


class VariantResult(Record):
    """The same contrast in another way."""

    words: str
    figure: str
    weighted: bool
    ratio: bool
    contrast: str
    bound: str | None
    verdict: str
    cells: list[Shown]
    comparable: bool = True
    """Whether it has the bound of its part, and is a ratio where that is one, so that both can be
    drawn on one axis."""


class PartResult(Record):
    """A contrast of a claim."""

    words: str
    figure: str
    weighted: bool
    ratio: bool
    contrast: str
    """What stands beside what, in words."""
    bound: str | None
    """What is claimed of it; None: it is shown only."""
    units: str
    """What intervals are over, beside seeds: ``"documents"``, ``"classes"`` or nothing."""
    verdict: str | None
    cells: list[Shown]
    variants: list[VariantResult]


class ClaimResult(Record):
    """A claim with its verdict."""

    id: str
    words: str
    note: str
    rule: str
    """How the verdict was to be found, as it was written before."""
    verdict: str
    """``"holds"``, ``"does not hold"``, ``"not decided"``; ``"shown"`` where nothing is claimed,
    ``"not measured"`` with `why` where a step is not done. Also where it cannot be decided, `why`
    says it."""
    why: str
    parts: list[PartResult]


class Done(Record):
    """A step and what it took."""

    step: str
    command: str
    """Its command line."""
    digest: str
    state: str
    seconds: float | None
    chosen: list[dict[str, Any]] | None
    """Of `choose`: what was chosen for each arm."""


class StudyResult(Record):
    """What study.json holds."""

    version: int
    name: str
    title: str
    question: str
    scale: str | None
    file_sha256: str
    """Hash of the study's file."""
    claims: list[ClaimResult]
    figures: dict[str, str] = Field(default={})
    """What the figures are that the claims are about, in words."""
    steps: list[Done]
    versions: dict[str, str]
    at: str


def claim_result(
    claim: Claim, subjects: Sequence[Subject], measures: Measures, waiting: Sequence[str] = ()
) -> ClaimResult:
    """The verdict of a claim.

    Args:
        claim: of the study.
        subjects: coders that were measured.
        measures: their figures.
        waiting: steps that it needs and that are not done.
    """
    parts: list[PartResult] = []
    verdict = NOT_MEASURED
    why = f"{', '.join(waiting)} {'is' if len(waiting) == 1 else 'are'} not done"
    if not waiting:
        try:
            (parts, verdict), why = _parts(claim, subjects, measures), ""
        except UserError as error:  # of this claim; the others stand
            parts, verdict, why = [], "not decided", str(error)
    return ClaimResult(
        id=claim.id,
        words=claim.words,
        note=claim.note,
        rule=rule_of(claim),
        verdict=verdict,
        why=why,
        parts=parts,
    )


def _parts(
    claim: Claim, subjects: Sequence[Subject], measures: Measures
) -> tuple[list[PartResult], str]:
    """Every contrast, and the verdict of all of them."""
    found: list[PartResult] = []
    estimates: list[Estimate | None] = []
    bounds: list[Bound] = []
    for number, part in enumerate(claim.parts, 1):
        where = f"claim {claim.id}" + (f", part {number}" if len(claim.parts) > 1 else "")
        cells = cells_of(part, subjects, measures, where)
        bound = part.bound
        if bound is not None:
            estimates += _known(cells)
            bounds += [bound] * len(cells)
        variants = []
        for variant in part.variants:
            other = part.changed(variant)
            own = cells_of(other, subjects, measures, f"{where}, variant {variant.words!r}")
            variants.append(
                VariantResult(
                    words=variant.words,
                    figure=other.figure,
                    weighted=other.weighted,
                    ratio=other.ratio,
                    contrast=_words(other),
                    bound=None if other.bound is None else str(other.bound),
                    verdict=_verdict(own, other.bound, claim.some) or "shown",
                    cells=[_shown(c) for c in own],
                    comparable=(other.ratio, other.bound) == (part.ratio, part.bound),
                )
            )
        found.append(
            PartResult(
                words=part.words,
                figure=part.figure,
                weighted=part.weighted,
                ratio=part.ratio,
                contrast=_words(part),
                bound=None if bound is None else str(bound),
                units=units_of(part.figure),
                verdict=_verdict(cells, bound, claim.some),
                cells=[_shown(c) for c in cells],
                variants=variants,
            )
        )
    return found, decide(estimates, bounds, some=claim.some) if estimates else "shown"


def _known(cells: Sequence[Cell]) -> list[Estimate | None]:
    """Estimates of the cells that are whole."""
    return [None if cell.left_out else cell.estimate for cell in cells]


def _verdict(cells: Sequence[Cell], bound: Bound | None, some: bool) -> str | None:
    """The verdict of one contrast by itself."""
    if bound is None:
        return None
    return decide(_known(cells), [bound] * len(cells), some=some)


def _shown(cell: Cell) -> Shown:
    made = cell.estimate
    return Shown(
        where={n: text_of(v) for n, v in cell.where.items()},
        value=made.value if made else None,
        interval=made.interval() if made else None,
        first=cell.first,
        against=cell.against,
        decides=resolution(made) if made else None,
        seeds=made.seeds if made else 0,
        units=made.units if made else 0,
        error_seeds=made.error_seeds if made else 0.0,
        error_units=made.error_units if made else 0.0,
        pairs=cell.pairs,
        left_out=cell.left_out,
        outside=cell.outside,
        coders=[list(pair) for pair in cell.names],
    )


def _words(part: Part) -> str:
    """What stands beside what."""
    figure = part.figure + (", weighted by firings" if part.weighted else "")
    if part.against is None:
        return f"{figure} of coders with {words_of(part.coders)}"
    other = "" if part.against_figure is None else f"{part.against_figure} of "
    joined = "over" if part.ratio else "less"
    at = f", at equal {part.equal}" if part.equal else ""
    return f"{figure}: {words_of(part.coders)} {joined} {other}{words_of(part.against)}{at}"


def rule_of(claim: Claim) -> str:
    """How a verdict is found, in a sentence; it depends on nothing that was measured."""
    said = []
    for part in claim.parts:
        if part.bound is not None:
            each = f" for each {' and '.join(part.each)}" if part.each else ""
            said.append(f"{_words(part)} is {part.bound}{each}")
    if not said:
        return "Nothing is claimed; the figures are shown."
    which = "one of the intervals" if claim.some else "every interval"
    return (
        f"Holds if {which} of 95 % lies where the claim says: {'; '.join(said)}. Intervals are "
        f"over seeds, of which there must be several, and over documents or classes where the "
        f"figure is a sum over them. Does not hold if "
        + ("every interval lies elsewhere" if claim.some else "one lies elsewhere")
        + " (at a level that allows for how many there are). Else it is not decided."
    )

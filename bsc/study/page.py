"""study.html: the claims of a study with their verdicts, as one static page.

It has no script and asks for nothing: style and plots are inline, and the page's content security
policy allows no request. Text from a study's file is escaped by the template engine, and characters
that would act on a page are shown. The same result gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from markupsafe import Markup

import bsc.eval.report
from bsc.errors import UserError
from bsc.eval.report.report import environment_of
from bsc.files import write_atomically
from bsc.formats import printable
from bsc.study.plots import (
    claimed_words,
    cut_off,
    drawable,
    forest_of,
    place,
    variants_drawn,
)
from bsc.study.results import ClaimResult, Done, PartResult, StudyResult
from bsc.study.subjects import text_of
from bsc.study.summary import Summary, claim_summary, decimals, summary, word_of, written
from bsc.study.table import span

__all__ = ["render_study", "write_study_page"]

_SIGNS = {
    "holds": "\u2713",
    "does not hold": "\u2717",
    "not decided": "?",
    "shown": "\u2022",
    "not measured": "\u2013",
}
"""Of each verdict, in the order of the page: verdicts are told apart without their colours."""
_COUNTED = {
    "holds": ("holds", "hold"),
    "does not hold": ("does not hold", "do not hold"),
    "not decided": ("is not decided", "are not decided"),
    "shown": ("is of figures that are only shown", "are of figures that are only shown"),
    "not measured": ("is not measured", "are not measured"),
}


class _ShownPart(NamedTuple):
    """A contrast, and what the page says of it beside what is in the record."""

    part: PartResult
    number: int
    digits: int
    """Behind the point."""
    word: str
    """``"difference"``, ``"ratio"`` or ``"figure"``."""
    fields: list[str]
    """That tell cells apart."""
    svg: Markup | None
    """None: no cell has an estimate."""
    caption: str
    variants: list[tuple[str, str, Summary, bool]]
    """Of each other way its words, its verdict, its estimate and whether the verdict is that of the
    part."""


class _ShownClaim(NamedTuple):
    """A claim."""

    claim: ClaimResult
    key: Summary | None
    parts: list[_ShownPart]


class _Arm(NamedTuple):
    """What was chosen for some coders."""

    fields: list[str]
    """Values of the columns of `_Choice.fields`."""
    tried: list[tuple[str, bool]]
    """For each of `_Choice.values` the figure, and whether it is the chosen one."""
    value: str
    edge: bool


class _Choice(NamedTuple):
    """What a step of `choose` chose."""

    step: str
    field: str
    fields: list[str]
    values: list[str]
    arms: list[_Arm]


def render_study(result: StudyResult) -> str:
    """The page, as text.

    Args:
        result: what came of the study, whether or not all of it is measured.
    """
    style = (Path(bsc.eval.report.__file__).parent / "style.css").read_text()
    own = (Path(__file__).parent / "study.css").read_text()
    environment = environment_of("bsc.study")
    environment.filters |= {
        "written": written,
        "short": _short,
        "place": place,
        "span": span,
        "many": _many,
        "claimed": claimed_words,
    }
    page = environment.get_template("page.html.j2").render(
        style=Markup(style + own),
        result=result,
        claims=[_claim(claim) for claim in result.claims],
        counts=_counts(result.claims),
        signs=_SIGNS,
        waiting=[step for step in result.steps if step.state != "done"],
        choices=[_choice(step) for step in result.steps if step.chosen],
    )
    return printable(page, lines=True)


def write_study_page(result: StudyResult, path: Path) -> None:
    """Write the page in one step.

    Args:
        result: what came of the study.
        path: file to write.

    Raises:
        UserError: it cannot be written.
    """
    page = render_study(result)
    try:
        write_atomically(path, page)
    except OSError as error:
        raise UserError(f"{path}: the page cannot be written ({error.strerror}).") from None


def _many(count: int, one: str, several: str | None = None) -> str:
    """A number of things.

    >>> _many(1, "seed"), _many(2, "way", "ways")
    ('1 seed', '2 ways')
    """
    return f"{count:,} {one if count == 1 else several or one + 's'}"


def _short(value: float | None) -> str:
    """A figure with four digits.

    >>> _short(0.31234), _short(12345.6), _short(None)
    ('0.3123', '12,346', '-')
    """
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _counts(claims: Sequence[ClaimResult]) -> str:
    """How many claims have which verdict, as a sentence."""
    said = []
    for verdict, (one, several) in _COUNTED.items():
        count = sum(c.verdict == verdict for c in claims)
        if count:
            said.append(f"{count} {one if count == 1 else several}")
    if not said:
        return "The study claims nothing."
    joined = f"{', '.join(said[:-1])} and {said[-1]}" if len(said) > 1 else said[0]
    return f"Of {_many(len(claims), 'claim')}, {joined}."


def _claim(claim: ClaimResult) -> _ShownClaim:
    parts = [_part(claim, part, number) for number, part in enumerate(claim.parts, 1)]
    return _ShownClaim(claim, claim_summary(claim), parts)


def _part(claim: ClaimResult, part: PartResult, number: int) -> _ShownPart:
    svg = forest_of(claim, number).svg() if drawable(part) else None
    return _ShownPart(
        part=part,
        number=number,
        digits=decimals(part.cells),
        word=word_of(part),
        fields=list(dict.fromkeys(name for cell in part.cells for name in cell.where)),
        svg=svg,
        caption=_caption(part),
        variants=[
            (v.words, v.verdict, summary(v.cells), v.verdict == part.verdict) for v in part.variants
        ],
    )


def _caption(part: PartResult) -> str:
    """What is to be seen in the plot."""
    over = f"seeds and {part.units}" if part.units else "seeds"
    said = [f"Squares are estimates, lines their 95 % intervals over {over}."]
    if part.bound is not None:
        said.append(f"Shaded is where the claim says that they lie: {claimed_words(part)}.")
    if any(cell.against is not None for cell in part.cells):
        said.append(f"At {1 if part.ratio else 0} both sides are equal.")
    if cut_off(part):
        said.append("An arrow is where an interval goes on beyond the plot.")
    if variants_drawn(part):
        said.append("Open circles are other ways of measuring.")
    elif part.variants:
        said.append("Other ways of measuring are in their table alone.")
    return " ".join(said)


def _choice(step: Done) -> _Choice:
    """What was tried and chosen, as a table: a line for each arm, a column for each value."""
    arms = step.chosen or []
    # `choose FIELD` is its command line.
    field = step.command.split()[-1]
    fields = [
        n for n in dict.fromkeys(n for a in arms for n in a) if n not in (field, "tried", "edge")
    ]
    values = list({text_of(v): v for a in arms for v, _ in a["tried"]}.values())
    if all(isinstance(v, (int, float)) for v in values):
        values.sort()
    columns = [text_of(v) for v in values]
    return _Choice(
        step.step, field, fields, columns, [_arm(a, field, fields, columns) for a in arms]
    )


def _arm(arm: dict[str, Any], field: str, fields: Sequence[str], columns: Sequence[str]) -> _Arm:
    figures = {text_of(v): "not finite" if f is None else _short(f) for v, f in arm["tried"]}
    chosen = text_of(arm[field])
    return _Arm(
        fields=[text_of(arm.get(n)) for n in fields],
        tried=[(figures.get(c, ""), c == chosen) for c in columns],
        value=chosen,
        edge=bool(arm["edge"]),
    )

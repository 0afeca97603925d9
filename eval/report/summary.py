"""What the figures say: sentences with the numbers in them, and comparisons at equal L0 or bits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from bsc.eval.evaluation import CoderFigures
from bsc.eval.figures.rate import Matched, matched
from bsc.eval.report.coders import ReportedCoder, by_panel
from bsc.formats import percent_span

__all__ = ["control_table", "matched_tables", "summary"]


def _span(values: Sequence[float], form: str) -> str:
    """First and last of figures along k, or the only one."""
    ends = [values[0]] if len(values) == 1 else [values[0], values[-1]]
    return " to ".join(format(v, form) for v in ends)


def _arms(members: Sequence[ReportedCoder]) -> dict[int, dict[str, ReportedCoder]]:
    """By k the one binary and the one continuous coder of the first seed, where there is one each.

    Where there are more, which two to compare is the reader's choice.
    """
    pairs: dict[int, dict[str, list[ReportedCoder]]] = {}
    for row in members:
        if row.seed == members[0].seed:
            pairs.setdefault(row.k, {}).setdefault(row.code, []).append(row)
    codes = ("binary", "continuous")
    return {
        k: {code: p[code][0] for code in codes}
        for k, p in sorted(pairs.items())
        if all(len(p.get(code, [])) == 1 for code in codes)
    }


def summary(rows: Sequence[ReportedCoder]) -> list[str]:
    """What the figures say, for each panel that has binary and continuous coders to compare."""
    sentences = []
    for panel, members in by_panel(rows).items():
        arms = _arms(members)
        if not arms:
            continue
        b, c = ([arm[code].figures for arm in arms.values()] for code in ("binary", "continuous"))
        sentences.append(
            f"{panel}, k = {_span(list(arms), 'd')}: binary coders leave "
            f"{percent_span([f.fvu for f in b], 1)} of the variance unexplained, continuous "
            f"ones {percent_span([f.fvu for f in c], 1)}. Spliced into the model they cost "
            f"{_span([f.delta_ce for f in b], '.3f')} and "
            f"{_span([f.delta_ce for f in c], '.3f')} nats per token."
        )
        sentences += [*_control_sentence(b, c), *_matched_sentence(members), _ultra_sentence(b, c)]
    seeds = {row.seed for row in rows if row.trained_here}
    if len(seeds) == 1:
        sentences.append(
            f"One seed only ({seeds.pop()}): intervals are over documents of the evaluation. How "
            f"much another seed would change is not known from this page."
        )
    return sentences


def _control_sentence(b: list[CoderFigures], c: list[CoderFigures]) -> list[str]:
    fvu = [f.fvu_binarised for f in c if f.fvu_binarised is not None]
    cost = [f.delta_ce_binarised for f in c if f.delta_ce_binarised is not None]
    if len(fvu) < len(c) or len(cost) < len(c):
        return []
    better = sum(f.fvu < other for f, other in zip(b, fvu, strict=True))
    cheaper = sum(f.delta_ce < other for f, other in zip(b, cost, strict=True))
    return [
        f"Continuous coders whose values are replaced, after training, by each latent's mean leave "
        f"{percent_span(fvu, 1)} unexplained and cost {_span(cost, '.3f')} nats. Training without "
        f"magnitudes leaves less unexplained than taking them away afterwards for {better} of "
        f"{len(b)} k, and costs the model less for {cheaper} of {len(b)}."
    ]


def _matched_sentence(members: Sequence[ReportedCoder]) -> list[str]:
    parts = []
    for by, name in (("l0", "L0"), ("bits", "bits")):
        for table in matched_tables(members, by):
            if table.other == "continuous":
                ratios = [x.fvu.binary / x.fvu.other for x in table.lines if x.fvu.other > 0]
                parts.append(f"{_span(sorted(ratios), '.2f')} times at equal {name}")
    return (
        [f"FVU of binary coders over that of continuous ones: {', '.join(parts)}."] if parts else []
    )


def _ultra_sentence(b: list[CoderFigures], c: list[CoderFigures]) -> str:
    return (
        f"Latents that fire on more than 10 % of tokens: "
        f"{_span([f.latents_above['0.1'] for f in b], 'd')} in binary coders, with "
        f"{percent_span([f.share_of_firings_above['0.1'] for f in b])} of all firings, and "
        f"{_span([f.latents_above['0.1'] for f in c], 'd')} in continuous ones, with "
        f"{percent_span([f.share_of_firings_above['0.1'] for f in c])}."
    )


class MatchedLine(NamedTuple):
    """A binary coder beside an interpolated other."""

    at: float
    """L0 or bits."""
    fvu: Matched
    delta_ce: Matched


class MatchedTable(NamedTuple):
    """Binary coders beside others of the same panel, run and seed."""

    panel: str
    run: str
    seed: int
    other: str
    """The code of the others."""
    lines: list[MatchedLine]


def matched_tables(rows: Sequence[ReportedCoder], by: str) -> list[MatchedTable]:
    """Binary coders beside interpolated others at the same L0 or bits, one table per variant pair.

    Args:
        rows: coders.
        by: ``"l0"`` or ``"bits"``.
    """
    groups: dict[tuple[object, ...], dict[str, list[ReportedCoder]]] = {}
    for row in rows:
        key = (row.panel, row.run, row.seed, row.planned.coder.select)
        groups.setdefault(key, {}).setdefault(row.code, []).append(row)
    tables = []
    for codes in groups.values():
        for other in ("continuous", "hybrid"):
            arms = [codes.get("binary", []), codes.get(other, [])]
            # More coders of one k differ in more than k: no one curve goes through them.
            if any(len({r.k for r in arm}) != len(arm) or not arm for arm in arms):
                continue
            binary, others = ([r.figures for r in arm] for arm in arms)
            # The size in bits is that of the quantised code, so its FVU is too.
            fvu = matched(binary, others, by, "fvu_quantised" if by == "bits" else "fvu")
            cost = matched(binary, others, by, "delta_ce")
            lines = [MatchedLine(one.at, one, two) for one, two in zip(fvu, cost, strict=True)]
            if lines:
                first = arms[0][0]
                tables.append(MatchedTable(first.panel, first.run, first.seed, other, lines))
    return tables


class ControlLine(NamedTuple):
    """A coder with values, beside the binary coder of its k."""

    panel: str
    row: ReportedCoder
    binary: ReportedCoder | None


def control_table(rows: Sequence[ReportedCoder]) -> list[ControlLine]:
    """Continuous coders with and without their values, beside the binary coder of their k."""
    return [
        ControlLine(panel, row, arms.get(row.k, {}).get("binary"))
        for panel, members in by_panel(rows).items()
        for arms in [_arms(members)]
        for row in members
        if row.figures.fvu_binarised is not None
    ]

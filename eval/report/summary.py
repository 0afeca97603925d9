"""What the figures say: sentences with the numbers in them, and comparisons at equal L0 or bits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bsc.eval.figures.rate import matched
from bsc.eval.report.coders import CoderRow, by_panel
from bsc.formats import percent_span

__all__ = ["control_table", "matched_tables", "summary"]


def _span(values: Sequence[float], form: str) -> str:
    """First and last of figures along k, or the only one."""
    ends = [values[0]] if len(values) == 1 else [values[0], values[-1]]
    return " to ".join(format(v, form) for v in ends)


def _arms(members: Sequence[CoderRow]) -> dict[int, dict[str, CoderRow]]:
    """By k the one binary and the one continuous coder of the first seed, where there is one each.

    Where there are more, which two to compare is the reader's choice.
    """
    pairs: dict[int, dict[str, list[CoderRow]]] = {}
    for row in members:
        if row.seed == members[0].seed:
            pairs.setdefault(row.k, {}).setdefault(row.code, []).append(row)
    codes = ("binary", "continuous")
    return {
        k: {code: p[code][0] for code in codes}
        for k, p in sorted(pairs.items())
        if all(len(p.get(code, [])) == 1 for code in codes)
    }


def summary(rows: Sequence[CoderRow]) -> list[str]:
    """What the figures say, for each panel that has binary and continuous coders to compare."""
    sentences = []
    for panel, members in by_panel(rows).items():
        arms = _arms(members)
        if not arms:
            continue
        b, c = ([arm[code].figures for arm in arms.values()] for code in ("binary", "continuous"))
        sentences.append(
            f"{panel}, k = {_span(list(arms), 'd')}: binary coders leave "
            f"{percent_span([f['fvu'] for f in b], 1)} of the variance unexplained, continuous "
            f"ones {percent_span([f['fvu'] for f in c], 1)}. Spliced into the model they cost "
            f"{_span([f['delta_ce'] for f in b], '.3f')} and "
            f"{_span([f['delta_ce'] for f in c], '.3f')} nats per token."
        )
        sentences += [*_control_sentence(b, c), *_matched_sentence(members), _ultra_sentence(b, c)]
    seeds = {row.seed for row in rows}
    if len(seeds) == 1:
        sentences.append(
            f"One seed only ({seeds.pop()}): intervals are over documents of the evaluation. How "
            f"much another seed would change is not known from this page."
        )
    return sentences


def _control_sentence(b: list[dict[str, Any]], c: list[dict[str, Any]]) -> list[str]:
    if not all("fvu_binarised" in f for f in c):
        return []
    better = sum(x["fvu"] < y["fvu_binarised"] for x, y in zip(b, c, strict=True))
    cheaper = sum(x["delta_ce"] < y["delta_ce_binarised"] for x, y in zip(b, c, strict=True))
    return [
        f"Continuous coders whose values are replaced, after training, by each latent's mean leave "
        f"{percent_span([f['fvu_binarised'] for f in c], 1)} unexplained and cost "
        f"{_span([f['delta_ce_binarised'] for f in c], '.3f')} nats. Training without magnitudes "
        f"leaves less unexplained than taking them away afterwards for {better} of {len(b)} k, and "
        f"costs the model less for {cheaper} of {len(b)}."
    ]


def _matched_sentence(members: Sequence[CoderRow]) -> list[str]:
    parts = []
    for by, name in (("l0", "L0"), ("bits", "bits")):
        for table in matched_tables(members, by):
            if table["other"] == "continuous":
                fvus = [line["fvu"] for line in table["lines"] if line["fvu"]["other"] > 0]
                ratios = [f["binary"] / f["other"] for f in fvus]
                parts.append(f"{_span(sorted(ratios), '.2f')} times at equal {name}")
    return (
        [f"FVU of binary coders over that of continuous ones: {', '.join(parts)}."] if parts else []
    )


def _ultra_sentence(b: list[dict[str, Any]], c: list[dict[str, Any]]) -> str:
    return (
        f"Latents that fire on more than 10 % of tokens: "
        f"{_span([f['latents_above']['0.1'] for f in b], 'd')} in binary coders, with "
        f"{percent_span([f['share_of_firings_above']['0.1'] for f in b])} of all firings, and "
        f"{_span([f['latents_above']['0.1'] for f in c], 'd')} in continuous ones, with "
        f"{percent_span([f['share_of_firings_above']['0.1'] for f in c])}."
    )


def matched_tables(rows: Sequence[CoderRow], by: str) -> list[dict[str, Any]]:
    """Binary coders beside interpolated others at the same L0 or bits, one table per variant pair.

    Args:
        rows: coders.
        by: ``"l0"`` or ``"bits"``.

    Returns:
        panel, run, seed, other (the code), lines: at, and for fvu and delta_ce binary and other.
    """
    groups: dict[tuple[Any, ...], dict[str, list[CoderRow]]] = {}
    for row in rows:
        key = (row.panel, row.run, row.seed, row.select)
        groups.setdefault(key, {}).setdefault(row.code, []).append(row)
    tables = []
    for (panel, run, seed, _), codes in groups.items():
        for other in ("continuous", "hybrid"):
            arms = [codes.get("binary", []), codes.get(other, [])]
            # More coders of one k differ in more than k: no one curve goes through them.
            if any(len({r.k for r in arm}) != len(arm) or not arm for arm in arms):
                continue
            figures = [[r.figures for r in arm] for arm in arms]
            # The size in bits is that of the quantised code, so its FVU is too.
            fvu = "fvu_quantised" if by == "bits" else "fvu"
            found = {f: matched(figures[0], figures[1], by, f) for f in (fvu, "delta_ce")}
            lines = [
                {"at": one["at"], "fvu": one, "delta_ce": two}
                for one, two in zip(found[fvu], found["delta_ce"], strict=True)
            ]
            if lines:
                tables.append({"panel": panel, "run": run, "seed": seed, "other": other,
                               "lines": lines})  # fmt: skip
    return tables


def control_table(rows: Sequence[CoderRow]) -> list[dict[str, Any]]:
    """Continuous coders with and without their values, beside the binary coder of their k."""
    lines = []
    for panel, members in by_panel(rows).items():
        arms = _arms(members)
        for row in members:
            if "fvu_binarised" in row.figures:
                binary = arms.get(row.k, {}).get("binary")
                lines.append({"panel": panel, "row": row, "binary": binary})
    return lines

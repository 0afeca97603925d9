"""From what a claim says of coders to estimates: which coder stands beside which."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from bsc.errors import ConfigError
from bsc.study.config import Contrast
from bsc.study.estimates import Estimate, Sums, estimate
from bsc.study.measures import Measures
from bsc.study.subjects import Subject, fields_of, selected, text_of

__all__ = ["Cell", "cells_of", "check_contrast"]

_MATCH = ("hookpoint", "site", "k", "n_latents", "seed")


class Cell(NamedTuple):
    """One estimate of a contrast."""

    where: dict[str, Any]
    """Values of the fields in `each`."""
    estimate: Estimate | None
    """None: no pair had the figure."""
    first: float | None
    """Mean figure of the coders."""
    against: float | None
    """Mean figure of what they stand beside."""
    pairs: int
    """Pairs of one seed."""
    left_out: int
    """Pairs that are not there in every seed: a coder has no figure, such as one that turned
    non-finite, or nothing to stand beside. What is left says nothing of them, so the cell is not
    decided."""
    outside: int
    """Pairs of an interpolation that are outside of what it is between."""
    names: list[tuple[str, str]]
    """Coders of each pair, of every seed; of an interpolation both of them, with `+`."""


def check_contrast(contrast: Contrast, subjects: Sequence[Subject], where: str) -> None:
    """See that a contrast speaks of coders that there are, before they are measured.

    Raises:
        ConfigError: it does not.
    """
    _sides(contrast, subjects, where)


def cells_of(
    contrast: Contrast, subjects: Sequence[Subject], measures: Measures, where: str
) -> list[Cell]:
    """The estimates of a contrast.

    Args:
        contrast: what is compared.
        subjects: coders of the study that were measured.
        measures: their figures.
        where: the claim, for messages.

    Raises:
        ConfigError: no coders are meant, or it is not clear which stands beside which.
    """
    groups: dict[tuple[str, ...], list[_Pair]] = {}
    for pair in _sides(contrast, subjects, where):
        cell = tuple(text_of(pair.first.fields.get(n)) for n in contrast.each)
        groups.setdefault(cell, []).append(pair)
    found = []
    for pairs in groups.values():
        fields = pairs[0].first.fields
        labels = {n: fields.get(n) for n in contrast.each}
        found.append(_cell(contrast, labels, pairs, measures, where))
    return sorted(found, key=lambda c: tuple(_order(v) for v in c.where.values()))


def _order(value: Any) -> tuple[bool, Any]:
    number = isinstance(value, (int, float))
    return (not number, value if number else text_of(value))


class _Pair(NamedTuple):
    """A coder and what it stands beside."""

    first: Subject
    against: list[Subject]
    """Empty: its own figure is meant, or there is none. One; or of several k, to interpolate
    between."""


def _sides(contrast: Contrast, subjects: Sequence[Subject], where: str) -> list[_Pair]:
    known = fields_of(subjects)
    match = contrast.match
    if match is None:
        named = {*contrast.coders, *(contrast.against or ())}
        match = tuple(n for n in _MATCH if n not in named or n == "seed")
    if contrast.equal:
        match = tuple(n for n in match if n != "k")
    for name in (*match, *contrast.each):
        if name not in known:
            raise ConfigError(f"{where}: match or each: coders have no field {name!r}.")
    first = selected(subjects, contrast.coders, f"{where}: coders")
    if contrast.against is None:
        return [_Pair(one, []) for one in first]
    others: dict[tuple[str, ...], list[Subject]] = {}
    for one in selected(subjects, contrast.against, f"{where}: against"):
        others.setdefault(_key(one, match), []).append(one)
    seen: dict[tuple[str, ...], Subject] = {}
    pairs = []
    for one in first:
        key = _key(one, match)
        own = (*key, text_of(one.fields["k"])) if contrast.equal else key
        if own in seen and seen[own] is not one:
            _many(where, "coders", [seen[own], one])
        seen[own] = one
        there = others.get(key, [])
        if len(there) > 1 and not contrast.equal:
            _many(where, "against", there)
        ks = [s.fields["k"] for s in there]
        if twice := next((k for k in ks if ks.count(k) > 1), None):
            _many(where, "against", [s for s in there if s.fields["k"] == twice])
        pairs.append(_Pair(one, sorted(there, key=lambda s: int(s.fields["k"]))))
    if not any(pair.against for pair in pairs):
        raise ConfigError(
            f"{where}: no coder has one to stand beside: none of them share {', '.join(match)}."
        )
    return pairs


def _many(where: str, side: str, subjects: Sequence[Subject]) -> None:
    a, b = subjects[:2]
    differ = [
        n
        for n in fields_of(subjects)
        if n != "name" and text_of(a.fields.get(n)) != text_of(b.fields.get(n))
    ]
    raise ConfigError(
        f"{where}: {side}: {len(subjects)} coders could stand in one place, as {a.fields['run']}'s "
        f"{a.name} and {b.fields['run']}'s {b.name}. They differ in {', '.join(differ[:6])}: say "
        f"which is meant, or add a field to `match`."
    )


def _key(subject: Subject, match: Sequence[str]) -> tuple[str, ...]:
    return tuple(text_of(subject.fields.get(n)) for n in match)


def _cell(
    contrast: Contrast,
    labels: dict[str, Any],
    pairs: Sequence[_Pair],
    measures: Measures,
    where: str,
) -> Cell:
    # By what the pairs of different seeds share, then by seed.
    rows: dict[tuple[str, ...], dict[Any, _Both | None]] = {}
    seeds = list(dict.fromkeys(p.first.fields["seed"] for p in pairs))
    alike = [n for n in fields_of([p.first for p in pairs]) if n not in ("name", "seed", *_OF_SEED)]
    names: dict[tuple[str, ...], list[tuple[str, str]]] = {}
    for pair in pairs:
        key = _key(pair.first, alike)
        rows.setdefault(key, {})[pair.first.fields["seed"]] = _both(contrast, pair, measures)
        other = " + ".join(f"{s.fields['run']}:{s.name}" for s in pair.against)
        own = f"{pair.first.fields['run']}:{pair.first.name}"
        names.setdefault(key, []).append((own, other))
    whole: dict[tuple[str, ...], list[_Both]] = {}
    outside = 0
    for key, row in rows.items():
        pairs_of_seeds = [row.get(seed) for seed in seeds]
        if any(pair is _OUTSIDE for pair in pairs_of_seeds) and None not in pairs_of_seeds:
            outside += 1
        elif None not in pairs_of_seeds:
            whole[key] = [pair for pair in pairs_of_seeds if pair]
    left_out = len(rows) - len(whole) - outside
    if not whole:
        return Cell(labels, None, None, None, 0, left_out, outside, [])
    found = [[of[i] for of in whole.values()] for i in range(len(seeds))]
    first = [[pair.first for pair in row] for row in found]
    against = [[pair.against for pair in row if pair.against] for row in found]
    for side in (first, against):
        if len({s.units for row in side for s in row}) > 1:
            raise ConfigError(
                f"{where}: coders that were measured on several stores, or on other rows of one "
                f"(--rows, tokens that a run was trained without), are one mean. Name the run, or "
                f"add it to `each`."
            )
    single = contrast.against is None
    made = estimate(first, None if single else against, ratio=contrast.ratio)
    if not math.isfinite(made.mean):
        raise ConfigError(f"{where}: the ratio of {contrast.figure} is of numbers that can be 0.")
    return Cell(
        labels,
        made,
        float(np.mean([s.value for row in first for s in row])),
        None if single else float(np.mean([s.value for row in against for s in row])),
        len(whole),
        left_out,
        outside,
        [name for key in whole for name in names[key]],
    )


class _Both(NamedTuple):
    """Figures of a pair."""

    first: Sums
    against: Sums | None


_OUTSIDE = _Both(Sums(np.zeros(1), np.ones(1)), None)
"""Of a pair outside of what an interpolation is between."""
_OF_SEED = ("parent", "parent_xxh3_128", "parent_kind")
"""Fields of a finetuned coder that belong to its seed."""


def _both(contrast: Contrast, pair: _Pair, measures: Measures) -> _Both | None:
    """Figures of a pair; None where one has none."""
    first = measures.sums(pair.first, contrast)
    if first is None:
        return None
    if contrast.against is None:
        return _Both(first, None)
    if not pair.against:
        return None
    other = contrast.model_copy(update=_of_other(contrast))
    if contrast.equal is None:
        against = measures.sums(pair.against[0], other)
        return None if against is None else _Both(first, against)
    between = _between(contrast.equal, pair, measures)
    if between is None:
        return _OUTSIDE
    (a, b), share = between
    low, high = measures.sums(a, other), measures.sums(b, other)
    if low is None or high is None:
        return None
    numerators = (1 - share) * low.numerators + share * high.numerators
    weights = (1 - share) * low.weights + share * high.weights
    return _Both(first, Sums(numerators, weights, low.units))


def _of_other(contrast: Contrast) -> Mapping[str, Any]:
    """What differs in the contrast of the other side: its figure and its judge, where given."""
    own = {"figure": contrast.against_figure, "judge": contrast.against_judge}
    return {name: value for name, value in own.items() if value is not None}


def _between(
    figure: str, pair: _Pair, measures: Measures
) -> tuple[tuple[Subject, Subject], float] | None:
    """The two coders between which one of equal L0 or bits would be, and how far it is from the
    first to the second, over the logarithm; None: outside of them all."""
    plain = Contrast(figure=figure, coders={})
    at = measures.sums(pair.first, plain)
    points = [(measures.sums(s, plain), s) for s in pair.against]
    line = sorted(((p.value, s) for p, s in points if p is not None), key=lambda x: x[0])
    if at is None:
        return None
    for (low, a), (high, b) in itertools.pairwise(line):
        if low <= at.value <= high and high > low > 0:
            share = (math.log(at.value) - math.log(low)) / (math.log(high) - math.log(low))
            return (a, b), share
    return None

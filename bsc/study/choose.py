"""Choosing a value for each arm of a study, such as its step size.

What is compared is what training itself has measured over its last tenth: on rows that the coder
had not seen, for a run that is chosen by goes over its rows at most once, and never on a held-out
document. So what is chosen knows nothing of the documents that the study is decided on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from bsc.errors import ConfigError, StoreError, UserError
from bsc.study.subjects import Subject, fields_of, text_of
from bsc.train.coders.coder import SparseCoder
from bsc.train.run import Run

__all__ = ["chosen_value", "choose"]

_LAST = 10
"""The last of so many parts of a training is what counts."""


def choose(
    subjects: Sequence[Subject], field: str, by: Sequence[str], figure: str, where: str
) -> list[dict[str, Any]]:
    """For each arm the value of a field that leaves least of a figure.

    Args:
        subjects: coders of runs that were trained or finetuned.
        field: whose values are compared, for example ``"lr"``.
        by: fields that tell arms apart.
        figure: of metrics.jsonl, for example ``"fvu"``.
        where: what asks, for messages.

    Returns:
        For each arm its fields, the chosen value of `field`, `tried` with the figure of each value
        that was tried, in their order, and whether the chosen one is the first or last: `edge`.

    Raises:
        ConfigError: a field is none, or the values of an arm were not tried on the same coders.
        UserError: no value gave finite figures, or rows were seen more than once.
    """
    known = fields_of(subjects)
    for name in (field, *by):
        if name not in known:
            raise ConfigError(f"{where}: coders have no field {name!r}.")
    figures: dict[str, dict[str, float]] = {}
    for subject in subjects:
        folder = str(subject.run.folder)
        if folder not in figures:
            _check_once(subject.run, where)
            figures[folder] = _last(subject.run, figure, where)
    arms: dict[tuple[str, ...], dict[Any, dict[str, float]]] = {}
    first: dict[tuple[str, ...], Subject] = {}
    varying = [n for n in ("hookpoint", "site", "code", "k", "n_latents", "seed") if n not in by]
    for one in subjects:
        arm = tuple(text_of(one.fields.get(n)) for n in by)
        first.setdefault(arm, one)
        like = ", ".join(text_of(one.fields.get(n)) for n in varying)
        value = one.fields[field]
        tried = arms.setdefault(arm, {}).setdefault(value, {})
        if like in tried:
            raise ConfigError(
                f"{where}: two coders have {field} = {text_of(value)} and {like}. What else they "
                f"differ in belongs into `by`."
            )
        tried[like] = figures[str(one.run.folder)].get(one.name, math.inf)
    return [
        {n: first[arm].fields.get(n) for n in by} | _best(tried, field, f"{where}, {arm}")
        for arm, tried in arms.items()
    ]


def _best(tried: Mapping[Any, Mapping[str, float]], field: str, where: str) -> dict[str, Any]:
    values = sorted(tried, key=lambda v: (v is None, isinstance(v, str), v or 0))
    same = [set(tried[v]) for v in values]
    if any(s != same[0] for s in same):
        raise ConfigError(f"{where}: the values of {field} were not tried on the same coders.")
    means = [sum(tried[v].values()) / len(tried[v]) for v in values]
    finite = [m for m in means if math.isfinite(m)]
    if not finite:
        raise UserError(f"{where}: no value of {field} gave coders that stayed finite.")
    best = means.index(min(finite))
    return {
        field: values[best],
        "tried": [[v, m if math.isfinite(m) else None]
                  for v, m in zip(values, means, strict=True)],
        "edge": len(values) > 1 and best in (0, len(values) - 1),
    }  # fmt: skip


def _check_once(run: Run, where: str) -> None:
    config = run.config()
    steps, batch = config.steps, config.batch_rows
    rows = None if steps is None or batch is None else steps * batch
    once = config.rows_of_a_pass or config.rows
    if rows is not None and config.finetuned is None and rows > once:
        raise UserError(
            f"{where}: {run.folder} was trained on {rows:,} rows of {once:,}: rows that "
            f"were seen before say nothing of new ones. Choose by a run of one pass at most."
        )


def _last(run: Run, figure: str, where: str) -> dict[str, float]:
    """Means of a figure over the last steps, by coder; of those that stayed finite."""
    lines: dict[str, list[float]] = {}
    for line in run.metrics():
        value = line.get(figure)
        lines.setdefault(line["coder"], []).append(math.inf if value is None else float(value))
    if not lines:
        raise StoreError(f"{where}: {run.metrics_path} has no figures.")
    means = {}
    for coder, values in lines.items():
        last = values[-max(1, len(values) // _LAST) :]
        if SparseCoder.about_of(run.coder_folder(coder)).get("frozen_at_step") is None:
            means[coder] = sum(last) / len(last)
    if all(math.isinf(m) for m in means.values()):
        raise ConfigError(f"{where}: metrics.jsonl has no figure {figure!r}.")
    return means


def chosen_value(chosen: Sequence[Mapping[str, Any]], field: str, point: Mapping[str, Any]) -> Any:
    """What was chosen for a coder; None: nothing for its like.

    Args:
        chosen: as `choose` gives it.
        field: that was chosen.
        point: fields of the coder.
    """
    for arm in chosen:
        by = [n for n in arm if n not in (field, "tried", "edge")]
        if all(text_of(arm[n]) == text_of(point.get(n)) for n in by):
            return arm[field]
    return None

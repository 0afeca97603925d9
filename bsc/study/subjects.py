"""Coders as a study speaks of them: what each is, in one flat table of fields.

The fields are those of the coder's config, of its training or finetuning, its hookpoint, group,
seed and name, and `run`, the step that made it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from bsc.errors import ConfigError, nearest
from bsc.train.run import Run

__all__ = ["Subject", "fields_of", "selected", "subjects_of", "text_of", "words_of"]


class Subject(NamedTuple):
    """A coder of a study."""

    run: Run
    name: str
    fields: Mapping[str, Any]


def subjects_of(step: str, run: Run) -> list[Subject]:
    """The coders of a run that a step made."""
    found = []
    for planned in run.config().coders:
        fields = planned.coder.model_dump() | planned.model_dump() | {"run": step}
        del fields["coder"]
        found.append(Subject(run, planned.name, fields))
    return found


def fields_of(subjects: Iterable[Subject]) -> list[str]:
    """Names of the fields that any of some coders has."""
    return list(dict.fromkeys(name for one in subjects for name in one.fields))


def selected(
    subjects: Sequence[Subject], selection: Mapping[str, Any], where: str
) -> list[Subject]:
    """Those whose fields have the values that are asked for.

    Args:
        subjects: every coder of the study.
        selection: by field, a value or a list of values of which it has one.
        where: what asks, for messages.

    Raises:
        ConfigError: a field is none of any coder's, or no coder is meant.
    """
    known = fields_of(subjects)
    for name in selection:
        if name not in known:
            raise ConfigError(f"{where}: coders have no field {name!r}{nearest(name, known)}.")
    found = [s for s in subjects if all(_is(s.fields.get(n), v) for n, v in selection.items())]
    if not found:
        told = ", ".join(
            f"{n} is {', '.join(sorted({text_of(s.fields.get(n)) for s in subjects}))}"
            for n in selection
        )
        raise ConfigError(
            f"{where}: no coder is {words_of(selection)}. Of the study's coders {told}."
        )
    return found


def _is(value: Any, wanted: Any) -> bool:
    return value in wanted if isinstance(wanted, (list, tuple)) else bool(value == wanted)


def text_of(value: Any) -> str:
    """A value of a field as people read it.

    >>> text_of(0.001), text_of(None), text_of("topk")
    ('0.001', 'none', 'topk')
    """
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def words_of(selection: Mapping[str, Any]) -> str:
    """What a selection says."""
    return ", ".join(
        f"{n} = {' or '.join(map(text_of, v)) if isinstance(v, (list, tuple)) else text_of(v)}"
        for n, v in selection.items()
    )

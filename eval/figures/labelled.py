"""Labelled texts for sparse probing: a CSV or JSONL file, or a set that every installation has."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bsc.embedded.corpus import documents
from bsc.errors import UserError
from bsc.eval.config import EMBEDDED
from bsc.records import parse_json

__all__ = ["LabelledTexts", "read_labelled", "read_sets"]

_PACKAGES = (
    "asyncio", "builtins", "email", "importlib", "multiprocessing", "topics", "unittest", "xml",
)  # fmt: skip
"""In every Python from 3.11 on; `builtins` are docstrings and `topics` the prose of `help()`."""
_SNIPPET = 400
_MIN_TEXTS = 4
"""Fewest texts of a class, so that both sides of the split have two."""


class LabelledTexts(NamedTuple):
    """Texts with a class each."""

    name: str
    texts: list[str]
    labels: list[str]
    groups: list[str]
    """Texts of one group, such as snippets of one file, are never on both sides of the split."""

    @property
    def classes(self) -> list[str]:
        """In the order of their names."""
        return sorted(set(self.labels))


def read_labelled(source: str) -> LabelledTexts:
    """Read labelled texts.

    Args:
        source: ``"stdlib"``, or a CSV file with a header or a JSONL file, with the fields `text`,
            `label` and optionally `group`.

    Raises:
        UserError: there is no such file, a line is not as it should be, or a class is too small.
    """
    if source == EMBEDDED:
        return _checked(_embedded(), source)
    path = Path(source).expanduser()
    suffix = path.suffix.lower()
    if suffix not in (".csv", ".jsonl"):
        raise UserError(
            f"--probe {source}: labelled texts are a .csv file with a header or a .jsonl file, or "
            f"{EMBEDDED!r} for the embedded ones."
        )
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(_csv(file) if suffix == ".csv" else _jsonl(file, source))
    except FileNotFoundError:
        raise UserError(f"--probe {source}: no such file.") from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"--probe {source}: cannot be read ({error}).") from None
    found = LabelledTexts(path.stem, [], [], [])
    for number, row in rows:
        text, label = row.get("text"), row.get("label")
        if not isinstance(text, str) or label is None or isinstance(label, (dict, list)):
            raise UserError(
                f"--probe {source}, line {number}: each line needs a `text` and a `label`, found "
                f"{', '.join(map(str, row)) or 'nothing'}."
            )
        if text.strip():
            found.texts.append(text)
            found.labels.append(str(label))
            found.groups.append(str(row.get("group") or number))
    return _checked(found, source)


def read_sets(sources: Sequence[str]) -> list[LabelledTexts]:
    """Several sets of labelled texts.

    Raises:
        UserError: as `read_labelled`, or two of them have one name.
    """
    found = [read_labelled(source) for source in sources]
    names = [labelled.name for labelled in found]
    for name in names:
        if names.count(name) > 1:
            raise UserError(
                f"--probe: {names.count(name)} sets are called {name!r}, by the names of their "
                f"files. Rename one of the files."
            )
    return found


Fields = dict[str, Any]
"""A labelled text as a user wrote it, unchecked."""


def _csv(file: Iterable[str]) -> Iterator[tuple[int, Fields]]:
    reader = csv.DictReader(file)
    for row in reader:
        yield reader.line_num, row


def _jsonl(file: Iterable[str], source: str) -> Iterator[tuple[int, Fields]]:
    for number, line in enumerate(file, 1):
        if line.strip():
            try:
                row = parse_json(line)
            except ValueError as error:
                raise UserError(f"--probe {source}, line {number}: not JSON ({error}).") from None
            if not isinstance(row, dict):
                raise UserError(f"--probe {source}, line {number}: not a JSON object.")
            yield number, row


def _checked(found: LabelledTexts, source: str) -> LabelledTexts:
    if len(found.classes) < 2:
        which = f"all texts have the label {found.classes[0]!r}" if found.classes else "no text"
        raise UserError(f"--probe {source}: {which}; at least two labels are needed.")
    for label in found.classes:
        own = [g for g, l_ in zip(found.groups, found.labels, strict=True) if l_ == label]
        if len(own) < _MIN_TEXTS or len(set(own)) < 2:
            raise UserError(
                f"--probe {source}: label {label!r} has {len(own)} texts of {len(set(own))} "
                f"groups; at least {_MIN_TEXTS} texts of 2 groups are needed to train and to test."
            )
    return found


def _embedded() -> LabelledTexts:
    found = LabelledTexts(EMBEDDED, [], [], [])
    for document in documents("stdlib"):
        part = document.name.split("/")
        label = part[1] if part[0] == "stdlib" and len(part) > 2 else part[0]
        if label not in _PACKAGES:
            continue
        lines, size = [], 0
        for line in document.text.splitlines(keepends=True):
            lines.append(line)
            size += len(line)
            if size >= _SNIPPET:
                found.texts.append("".join(lines))
                found.labels.append(label)
                found.groups.append(document.name)
                lines, size = [], 0
    return found

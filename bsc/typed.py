"""Records with types: what is in a file of ours, checked once, where it is read.

A record is a file with a hash (bsc/records.py) whose fields are known. Fields that are missing,
unknown or of another type are one message, and what is read is never changed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from bsc.errors import StoreError
from bsc.records import parse_record, read_file, write_record

__all__ = ["Record", "combined", "parse_typed", "read_typed", "write_typed"]


class Record(BaseModel):
    """Part of a file, or the whole of it.

    A field with a default may be left out of the file; it is written only where it was given.
    ``record["field"]`` is ``record.field``, for names that are chosen at run time.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, defer_build=True)

    def __getitem__(self, name: str) -> Any:
        if name not in self.model_fields_set:
            raise KeyError(name)
        return getattr(self, name)

    def __str__(self) -> str:
        return repr(self)

    def __contains__(self, name: object) -> bool:
        return name in self.model_fields_set

    def get(self, name: str, default: Any = None) -> Any:
        """A field; `default` where it was left out."""
        return getattr(self, name) if name in self.model_fields_set else default

    def to_json(self) -> dict[str, Any]:
        """What JSON holds of it: the fields that were given."""
        return {name: _plain(getattr(self, name)) for name in sorted(self.model_fields_set)}


R = TypeVar("R", bound=Record)


def _plain(value: Any) -> Any:
    if isinstance(value, Record):
        return value.to_json()
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if isinstance(value, dict):
        return {name: _plain(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    return value


def combined(kind: type[R], *parts: Record, **more: Any) -> R:
    """A record of all fields of others.

    >>> class A(Record):
    ...     a: int
    >>> class B(A):
    ...     b: int
    >>> combined(B, A(a=1), b=2)
    B(a=1, b=2)
    """
    values: dict[str, Any] = {}
    for part in parts:
        values |= {name: getattr(part, name) for name in part.model_fields_set}
    return kind(**values, **more)


def parse_typed(kind: type[R], value: Any, where: str | Path, remedy: str = "") -> R:
    """A record from what JSON holds.

    Args:
        kind: of record.
        value: what was read.
        where: what it was read from, for the message.
        remedy: what to do if it cannot be used, a sentence for the message.

    Raises:
        StoreError: a field is missing, unknown or of another type; the message names the first.
    """
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        place = ".".join(map(str, first["loc"])) or "the whole"
        words = {"missing": "missing", "extra_forbidden": "unknown"}.get(
            first["type"], first["msg"][:1].lower() + first["msg"][1:]
        )
        raise StoreError(
            f"{where}: not of the form that it should have: {place}: {words}."
            + (f" {remedy}" if remedy else "")
        ) from None


def read_typed(kind: type[R], path: Path, what: str, version: int, remedy: str = "") -> R:
    """What `write_typed` wrote.

    Args:
        kind: of record.
        path: the file.
        what: what it is, for the message, for example ``"evaluation"``.
        version: that its field `version` should have.
        remedy: what to do if it cannot be used, a sentence for the message.

    Raises:
        StoreError: it is missing, cannot be read, is of another version, does not hold what was
            written, or is of another form.
    """
    value = parse_record(read_file(path, what, remedy), path, version, remedy)
    return parse_typed(kind, value, path, remedy)


def write_typed(path: Path, record: Record) -> None:
    """Replace `path` by a record, in one step."""
    write_record(path, record.to_json())

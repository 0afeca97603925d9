"""Records with types: what is not as it should be is one message, and nothing is changed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from bsc.config import Config
from bsc.errors import StoreError
from bsc.records import write_record
from bsc.typed import Record, combined, parse_typed, read_typed, write_typed
from tests.raw import raw


class Settings(Config):
    """A config in a record."""

    names: tuple[str, ...] = ()
    size: int = 3


class Part(Record):
    """Part of a record."""

    share: float
    interval: list[float] | None = None


class Whole(Record):
    """A record."""

    version: int
    parts: dict[str, Part]
    settings: Settings = Settings()
    note: str | None = None


GOOD: dict[str, Any] = {"version": 1, "parts": {"a": {"share": 0.5}}}


def test_what_is_written_is_read_again_and_no_more(tmp_path: Path) -> None:
    path = tmp_path / "whole.json"
    whole = parse_typed(Whole, GOOD | {"settings": {"names": ["x"]}}, "here")
    write_typed(path, whole)
    assert read_typed(Whole, path, "thing", 1) == whole
    # A config is written whole, a field of a record only where it was given.
    assert raw(path) == GOOD | {"settings": {"names": ["x"], "size": 3}}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"parts": {"a": {}}}, "parts.a.share: missing"),
        ({"odd": 1}, "odd: unknown"),
        ({"parts": {"a": {"share": "0.5"}}}, "parts.a.share: input should be a valid number"),
        ({"parts": {"a": {"share": True}}}, "parts.a.share: input should be a valid number"),
        ({"parts": {"a": {"share": 1, "interval": {"low": 1}}}}, "parts.a.interval: "),
        ({"parts": []}, "parts: input should be"),
        ({"note": 7}, "note: input should be a valid string"),
    ],
)
def test_another_form_is_one_message(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    path = tmp_path / "whole.json"
    write_record(path, GOOD | change)
    with pytest.raises(StoreError) as error:
        read_typed(Whole, path, "thing", 1, "Make it again.")
    words = str(error.value)
    assert words.startswith(f"{path}: not of the form that it should have: {says}"), words
    assert words.endswith("Make it again.") and "\n" not in words


def test_another_version_and_a_changed_byte_are_said_first(tmp_path: Path) -> None:
    path = tmp_path / "whole.json"
    write_record(path, GOOD | {"version": 2, "odd": 1})
    with pytest.raises(StoreError, match="of format version 2; this bsc reads 1"):
        read_typed(Whole, path, "thing", 1)
    write_record(path, GOOD)
    path.write_text(path.read_text().replace("0.5", "0.6"))
    with pytest.raises(StoreError, match="changed since it was written"):
        read_typed(Whole, path, "thing", 1)


def test_fields_are_reached_by_name_and_never_changed() -> None:
    part = Part(share=1)
    assert part["share"] == 1 and "interval" not in part and part.get("interval", 7) == 7
    with pytest.raises(KeyError):
        part["interval"]
    with pytest.raises(ValidationError):
        part.share = 2
    with_interval = combined(Part, part, interval=[0.5, 1.5])
    assert json.loads(json.dumps(with_interval.to_json())) == {"share": 1, "interval": [0.5, 1.5]}

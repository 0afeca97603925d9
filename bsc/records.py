"""JSON files: one way of reading what somebody else may have written or damaged, and a hash in what
this package writes.

A record is a JSON object with the key `xxh3_128`, the hash of all its other keys. Figures come from
records, and a digit that changed on a disk reads like any other: whoever reads a record meets an
error instead.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import xxhash

from bsc.errors import StoreError, UserError
from bsc.files import canonical_json, write_atomically

__all__ = [
    "check_seal",
    "expected_form",
    "parse_json",
    "parse_object",
    "parse_record",
    "read_file",
    "read_record",
    "record_hash",
    "sealed",
    "write_record",
]

_KEY = "xxh3_128"
# What may be half of a surrogate pair: looked at more closely.
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def _finite(text: str) -> float:
    value = float(text)
    if abs(value) == float("inf"):
        raise ValueError(f"the number {text[:20]} is not finite")
    return value


def _in_64_bits(text: str) -> int:
    if len(text) > 21 or abs(int(text)) >= 2**64:
        raise ValueError(f"the number {text[:20]}... has more than 64 bits")
    return int(text)


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is not a number of JSON")


def parse_json(text: str | bytes, *, halves: bool = False) -> Any:
    """The value of JSON text that anybody may have written.

    Args:
        text: what was read.
        halves: whether halves of surrogate pairs are let through, for whoever replaces them:
            language models stop in the middle of a character.

    Raises:
        ValueError: it is not UTF-8 or not JSON, nested too deeply, or holds a number that is not
            finite or has more than 64 bits, or text that is not Unicode (half a surrogate pair).

    >>> parse_json('{"a": [1, 2.5]}')
    {'a': [1, 2.5]}
    >>> parse_json("[" * 100_000)
    Traceback (most recent call last):
    ValueError: nested too deeply
    """
    text = text.decode("utf-8") if isinstance(text, bytes) else text
    try:
        value = json.loads(
            text, parse_constant=_no_constant, parse_float=_finite, parse_int=_in_64_bits
        )
        if not halves and _SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except RecursionError:
        raise ValueError("nested too deeply") from None


def parse_object(text: str | bytes, where: str | Path, remedy: str = "") -> dict[str, Any]:
    """The object that JSON text from `where` is.

    Args:
        text: what was read.
        where: what it was read from, for the message.
        remedy: what to do if it cannot be used, a sentence for the message.

    Raises:
        StoreError: it is no JSON, or something else than an object.
    """
    tail = f" {remedy}" if remedy else ""
    try:
        value = parse_json(text)
    except ValueError as error:
        raise StoreError(f"{where}: cannot be read as JSON ({error}).{tail}") from None
    if not isinstance(value, dict):
        raise StoreError(
            f"{where}: expected a JSON object, found {type(value).__name__}.{tail}"
        ) from None
    return value


@contextmanager
def expected_form(what: str, remedy: str = "") -> Iterator[None]:
    """A block that takes apart what was read, where another form than it should have is one error.

    Args:
        what: was read, for the message: files, or a folder.
        remedy: what to do, a sentence for the message.

    Raises:
        StoreError: the block met a missing key, or a value of another kind.
    """
    try:
        yield
    except UserError:
        raise
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        tail = f"{remedy} " if remedy else ""
        raise StoreError(
            f"{what}: not of the form that it should have ({error!r}). {tail}If nobody changed it, "
            f"this is a fault of bsc; --debug shows where."
        ) from error


def record_hash(value: dict[str, Any]) -> str:
    """XXH3-128 of an object without its own hash, 32 hexadecimal digits."""
    rest = {k: v for k, v in value.items() if k != _KEY}
    return xxhash.xxh3_128_hexdigest(canonical_json(rest).encode())


def sealed(value: dict[str, Any]) -> bytes:
    """Canonical JSON of an object with a hash of itself, so that any change of it shows."""
    return canonical_json(value | {_KEY: record_hash(value)}).encode()


def check_seal(value: dict[str, Any], where: str | Path, remedy: str = "") -> dict[str, Any]:
    """The object without its hash.

    Raises:
        StoreError: it has no hash, or not the one of its content.
    """
    try:
        same = value.get(_KEY) == record_hash(value)
    except RecursionError:
        same = False
    if not same:
        raise StoreError(
            f"{where}: changed since it was written, or damaged: its content does not have the "
            f"hash that it carries.{f' {remedy}' if remedy else ''}"
        )
    return {k: v for k, v in value.items() if k != _KEY}


def write_record(path: Path, value: dict[str, Any]) -> None:
    """Replace `path` by a record of `value`, in one step."""
    write_atomically(path, sealed(value))


def read_record(path: Path, what: str, version: int, remedy: str = "") -> dict[str, Any]:
    """What `write_record` wrote, without the hash.

    Args:
        path: the file.
        what: what it is, for the message, for example ``"run"``.
        version: that its key `version` should have.
        remedy: what to do if it cannot be used, a sentence for the message.

    Raises:
        StoreError: it is missing, cannot be read, is of another version, or does not hold what was
            written.
    """
    return parse_record(read_file(path, what, remedy), path, version, remedy)


def read_file(path: Path, what: str, remedy: str = "") -> bytes:
    """The bytes of a file.

    Args:
        path: the file.
        what: what it is, for the message.
        remedy: what to do if it cannot be read.

    Raises:
        StoreError: it is missing, or cannot be read.
    """
    tail = f" {remedy}" if remedy else ""
    try:
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise StoreError(f"{path.parent}: no {what} here ({path.name} is missing).{tail}") from None
    except OSError as error:
        raise StoreError(f"{path}: cannot be read ({error.strerror}).{tail}") from None


def parse_record(raw: bytes, path: Path, version: int, remedy: str = "") -> dict[str, Any]:
    """As `read_record`, of bytes that were read from `path`."""
    tail = f" {remedy}" if remedy else ""
    value = parse_object(raw, path, remedy)
    if value.get("version") != version:
        raise StoreError(
            f"{path}: of format version {str(value.get('version'))[:20]}; this bsc reads "
            f"{version}.{tail}"
        )
    return check_seal(value, path, remedy)

"""Writing files so that a reader, or a power cut, never meets half of one.

Imports nothing of this package but its errors.
"""

from __future__ import annotations

import csv
import errno
import io
import json
import os
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bsc.errors import UserError

__all__ = [
    "canonical_json",
    "check_new_folder",
    "csv_text",
    "fsync_folder",
    "make_durable_folder",
    "make_folder",
    "replacing",
    "write_atomically",
    "write_json",
]


def canonical_json(value: Any, *, indent: int | None = 2) -> str:
    """JSON text that is the same for equal values: sorted keys, no NaN, one final newline."""
    return json.dumps(value, indent=indent, sort_keys=True, allow_nan=False) + "\n"


def csv_text(lines: Sequence[Mapping[str, Any]]) -> str:
    """Lines of one table as CSV; a column for every key that any of them has.

    >>> csv_text([{"k": 8, "fvu": 0.25}, {"k": 16, "code": "a, b"}])
    'k,fvu,code\\n8,0.25,\\n16,,"a, b"\\n'
    """
    keys = list(dict.fromkeys(key for line in lines for key in line))
    text = io.StringIO()
    writer = csv.DictWriter(text, keys, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_folder(folder: Path) -> None:
    """Make renames and new names in `folder` survive a power cut."""
    _fsync(folder)


def make_durable_folder(folder: Path) -> None:
    """Make a folder and its missing parents, each entry durable before anything is put into it."""
    missing = []
    while not folder.exists():
        missing.append(folder)
        folder = folder.parent
    for new in reversed(missing):
        new.mkdir(exist_ok=True)
        fsync_folder(new.parent)


def write_atomically(path: Path, data: bytes | str | Iterable[str]) -> None:
    """Replace `path` by `data`, as `replacing` does."""
    parts = (data,) if isinstance(data, (bytes, str)) else data
    with replacing(path) as temporary, temporary.open("xb") as file:
        for part in parts:
            file.write(part.encode() if isinstance(part, str) else part)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Replace `path` by the file that the block writes: fsync, rename, fsync of the folder.

    Yields:
        Where to write. Nothing of it stays if the block raises.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        yield temporary
        _fsync(temporary)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_folder(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as canonical JSON, atomically."""
    write_atomically(path, canonical_json(value))


def check_new_folder(path: Path, what: str) -> None:
    """See that `path` can become a new folder, without making it.

    Args:
        path: a folder that is not there yet, or is empty.
        what: what it is to hold, for the message, for example ``"store"``.

    Raises:
        UserError: it is a file, holds something, or cannot be written.
    """
    parent = path
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir():
        raise UserError(f"{path}: a {what} is a folder, but {parent} is a file.")
    if parent == path and any(path.iterdir()):
        raise UserError(
            f"{path}: this folder is not empty, so no {what} can be started in it. Name another "
            f"folder, or remove this one first."
        )
    # Permissions, read-only mounts and odd file systems: only trying tells. Under a name of its
    # own, since others may be starting here at the same time; in a folder that has to stay empty
    # the permission alone is asked.
    try:
        if parent == path:
            if not os.access(path, os.W_OK | os.X_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        else:
            probe = parent / f".writable.{uuid.uuid4().hex}"
            probe.mkdir()
            probe.rmdir()
    except OSError as error:
        raise UserError(
            f"{path}: the {what} cannot be written here ({error.strerror}). Name a folder that "
            f"you may write to."
        ) from None


def make_folder(path: Path, what: str) -> None:
    """Make a new folder and its parents.

    Raises:
        UserError: as `check_new_folder`, or the file system refuses.
    """
    check_new_folder(path, what)
    path.mkdir(parents=True, exist_ok=True)

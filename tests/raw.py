"""Records as they are on disk, for tests that change them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bsc.records import parse_json

__all__ = ["raw"]


def raw(path: Path) -> dict[str, Any]:
    """A record as a dictionary, without its hash; `write_record` puts it back, changed or not."""
    value: dict[str, Any] = parse_json(path.read_bytes())
    value.pop("xxh3_128", None)
    return value

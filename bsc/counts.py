"""Counts as people write them on a command line."""

from __future__ import annotations

import re
from decimal import Decimal

__all__ = ["parse_count"]

MAX_COUNT = 10**15
"""Tokens that no capture has."""
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}


def parse_count(text: str | int) -> int:
    """A whole number with an optional unit: k, M, B or T.

    Raises:
        ValueError: it is something else.

    >>> parse_count("1.5M"), parse_count("2_000")
    (1500000, 2000)
    """
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([kmbt]?)", str(text).replace("_", "").lower())
    if match is None:
        raise ValueError(f"{_shown(text)} is not a count. Write 500000, 500k, 10M or 1B.")
    if len(match[1]) > 40 or (number := Decimal(match[1]) * _UNITS[match[2]]) > MAX_COUNT:
        raise ValueError(f"{_shown(text)} is larger than 1,000T.")
    if number != int(number):
        raise ValueError(f"{_shown(text)} is not a whole number.")
    return int(number)


def _shown(text: str | int) -> str:
    whole = str(text)
    return repr(whole if len(whole) <= 40 else f"{whole[:40]}...")

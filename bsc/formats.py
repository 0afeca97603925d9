"""Shares, intervals and foreign text as people read them: one way for pages, tables and messages.

Imports nothing of this package.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

__all__ = ["interval", "percent", "percent_interval", "percent_span", "printable"]

_JOINERS = "\u200c\u200d"
"""Format characters that spelling needs, of Persian and of emoji."""

_NONE = "no interval"


def percent(share: float, digits: int = 0) -> str:
    """A share as a percentage.

    >>> percent(0.362), percent(-0.00935, 2)
    ('36 %', '-0.94 %')
    """
    return f"{100 * share:.{digits}f} %"


def percent_span(shares: Sequence[float], digits: int = 0) -> str:
    """The first and the last of some shares, or the only one.

    >>> percent_span([0.363, 0.3, 0.25], 1), percent_span([0.5])
    ('36.3 to 25.0 %', '50 %')
    """
    ends = shares[:1] if len(shares) == 1 else (shares[0], shares[-1])
    return " to ".join(f"{100 * s:.{digits}f}" for s in ends) + " %"


def interval(value: Sequence[float] | None, digits: int = 4) -> str:
    """An interval, in the unit of its figure.

    >>> interval([-0.0129, 0.5], 3), interval(None)
    ('-0.013 to 0.500', 'no interval')
    """
    return _NONE if value is None else f"{value[0]:.{digits}f} to {value[1]:.{digits}f}"


def percent_interval(value: Sequence[float] | None, digits: int = 2) -> str:
    """An interval of a share, in percent like the share.

    >>> percent_interval([-0.0129, -0.0051], 2)
    '-1.29 to -0.51 %'
    """
    return _NONE if value is None else percent_span(value, digits)


def _visible(character: str) -> str:
    code = ord(character)
    return chr(0x2400 + code) if code < 32 else f"\u27e8U+{code:04X}\u27e9"


# The blocks that have such characters, rather than all of Unicode.
_BLOCKS = ((0, 0x3000), (0xD800, 0xE000), (0xFE00, 0x10000), (0xE0000, 0xE0080))
_INVISIBLE = {
    code: _visible(chr(code))
    for first, last in _BLOCKS
    for code in range(first, last)
    if unicodedata.category(chr(code)) in ("Cc", "Cf", "Zl", "Zp", "Cs")
    and chr(code) not in _JOINERS
}
_OF_LINES = {code: shown for code, shown in _INVISIBLE.items() if chr(code) not in "\n\t"}


def printable(text: str, *, lines: bool = False) -> str:
    """Text of somebody else with every character shown that would act on a terminal or a page:
    controls, changes of writing direction, line separators, halves of surrogate pairs.

    Args:
        text: whatever it is.
        lines: whether line feeds and tabs stay what they are.

    >>> printable("a\\x1b[2J\\n"), printable("\\u202egpj.exe")
    ('a␛[2J␊', '⟨U+202E⟩gpj.exe')
    """
    if text.isprintable():
        return text
    return text.translate(_OF_LINES if lines else _INVISIBLE)

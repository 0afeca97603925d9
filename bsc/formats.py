"""Shares and intervals as people read them: one way for pages, tables and messages.

Imports nothing of this package.
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["interval", "percent", "percent_interval", "percent_span"]

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

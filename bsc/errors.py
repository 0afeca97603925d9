"""Mistakes that a user can make, as opposed to bugs.

A `UserError` carries one message that says what is wrong, where, what was expected and what to
do. The command line prints it on stderr and exits with 2; `--debug` shows the traceback. Library
callers can catch it, or the builtin that its subclass derives from.

Imports nothing: every part of bsc may raise these.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = ["ConfigError", "StoreError", "UserError", "nearest"]


class UserError(ValueError):
    """The request cannot be carried out as it stands; the message says what would work."""


class ConfigError(UserError):
    """A field of a config (a flag, a TOML key, a saved config.json) has a wrong value or name."""


class StoreError(UserError):
    """A folder that should be an activation store, a run or a coder is not, or is damaged."""


def nearest(word: str, known: Iterable[str], n: int = 3) -> str:
    """A clause that names the known words nearest to `word`, empty when none is near.

    >>> nearest("layer.3.mlp", ["layers.3.mlp", "norm"])
    " (did you mean 'layers.3.mlp'?)"
    >>> nearest("zzz", ["layers.3.mlp"])
    ''
    """
    close = difflib.get_close_matches(word, list(known), n=n, cutoff=0.6)
    if not close:
        return ""
    return f" (did you mean {' or '.join(repr(c) for c in close)}?)"

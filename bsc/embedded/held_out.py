"""Which documents are held out: one rule for the whole project.

A document is held out when the hash of its name falls below `fraction` of the hash's range. The
rule needs no list, no seed and no count of documents, so the recipe of the embedded model, a
capture and an evaluation agree about the same file on any machine. A smaller fraction holds out a
subset of what a larger one does.

Imports nothing of this package.
"""

from __future__ import annotations

import hashlib

__all__ = ["HELD_OUT_FRACTION", "is_held_out"]

HELD_OUT_FRACTION = 0.05
"""Share of documents held out by default, and by the recipe of the embedded model."""


def is_held_out(name: str, fraction: float = HELD_OUT_FRACTION) -> bool:
    """Whether the document called `name` belongs to the held-out share.

    Args:
        name: the document's name within its corpus, for example ``stdlib/json/decoder.py``.
        fraction: share of documents to hold out, 0 to 1.

    >>> [is_held_out(f"doc/{i}") for i in range(1000)].count(True)
    52
    >>> is_held_out("doc/1", 0.0), is_held_out("doc/1", 1.0)
    (False, True)
    """
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64

"""Which documents are held out: texts that share much are on one side, so that what is held out is
not seen in training word for word.

Of a stream of documents nothing is kept. The side of a text is decided by a hash of the smallest
of the hashes of its 64-byte shingles (every run of 64 adjacent bytes of its UTF-8 form). Two texts
have the same smallest shingle with probability J, the Jaccard similarity of their sets of shingles
(Broder 1997, On the resemblance and containment of documents); then they are on one side for sure,
and otherwise by chance, so near copies are apart with probability (1 - J) times twice the held-out
share at most. What is left of that is measured at every capture (capture/overlap.py).

Of an embedded corpus all documents are at hand, and only those may be held out that the embedded
model never saw, which are known by their names (bsc/embedded/held_out.py). Of these, documents are
left to training of whose shingles more than a twentieth stand in training documents.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from bsc.embedded.corpus import Document
from bsc.embedded.held_out import is_held_out
from bsc.hashing import run_hashes

__all__ = ["SHINGLE_BYTES", "held_out_documents", "is_text_held_out"]

SHINGLE_BYTES = 64
_SHARED = 0.05
"""Share of a document's shingles that may stand in training documents."""
_SAMPLE = np.uint64(15)
"""Only shingles whose hash has none of these bits are looked at in a corpus: a sixteenth."""


def _shingles(text: str) -> NDArray[np.uint64]:
    raw = text.encode("utf-8", "surrogatepass")
    return run_hashes(np.frombuffer(raw, np.uint8), SHINGLE_BYTES)


def is_text_held_out(text: str, fraction: float) -> bool:
    """Whether a document of a stream is held out, by its text alone.

    Args:
        text: of the document; one of fewer than 64 bytes goes by the hash of all of it.
        fraction: share of documents to hold out, 0 to 1.

    >>> page = "".join(f"line {i} of a long page\\n" for i in range(200))
    >>> ends = ("", "one more line\\n", "another line\\n")
    >>> len({is_text_held_out(page + end, 0.5) for end in ends})
    1
    """
    if fraction <= 0:
        return False
    shingles = _shingles(text)
    if len(shingles):
        name = f"shingle {int(shingles.min()):016x}"
    else:
        name = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
    return is_held_out(name, fraction)


def held_out_documents(documents: Sequence[Document], fraction: float) -> list[bool]:
    """Which documents of an embedded corpus are held out.

    Those whose names say so, but for documents that share more than a twentieth of their shingles
    with the training documents, to which they then belong.
    """
    held_out = [is_held_out(d.name, fraction) for d in documents]
    if not any(held_out):
        return held_out
    sampled = [h[h & _SAMPLE == 0] for h in (_shingles(d.text) for d in documents)]
    shared = {i: np.zeros(len(sampled[i]), bool) for i, held in enumerate(held_out) if held}
    new = [h for h, held in zip(sampled, held_out, strict=True) if not held]
    while new:
        known = np.sort(np.concatenate(new))  # faster than np.unique, and copies do no harm
        new = []
        for i, seen in list(shared.items()):
            if len(known):
                at = np.searchsorted(known, sampled[i]).clip(max=len(known) - 1)
                seen |= known[at] == sampled[i]
            if seen.sum() > _SHARED * len(seen):
                held_out[i] = False
                new.append(sampled[i])
                del shared[i]
    return held_out

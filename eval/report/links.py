"""Where pages of the browser are, for pages that link to them, and how strong marks are."""

from __future__ import annotations

import hashlib
import re

__all__ = ["BROWSER", "coder_slug", "latent_page", "shade"]

BROWSER = "browse"
"""Name of the folder of pages of latents, beside a report."""
_STRANGE = re.compile(r"[^A-Za-z0-9._-]")
_LONGEST = 160
"""Characters of a folder's name."""
_IN_A_FOLDER = 1000
"""Pages of latents that are in one folder: file systems are slow with many."""


def coder_slug(name: str, run: str = "") -> str:
    """Name of a coder's folder in a browser: one that needs no quoting in an address.

    >>> coder_slug("layers.3.mlp/sae-k32", "a/run"), coder_slug("sae", "50%?")
    ('a~run~layers.3.mlp~sae-k32', '50~~~sae~109ac940')
    """
    whole = f"{run}/{name}" if run else name
    slug = _STRANGE.sub("~", whole)[:_LONGEST]
    if slug == whole.replace("/", "~"):
        return slug
    return f"{slug}~{hashlib.sha256(whole.encode()).hexdigest()[:8]}"


def latent_page(latent: int) -> str:
    """Where the page of a latent is in its coder's folder.

    >>> latent_page(12_345)
    '12/12345.html'
    """
    return f"{latent // _IN_A_FOLDER}/{latent}.html"


def shade(value: float, largest: float) -> int:
    """Strength of a mark, 1 to 9, of which 9 is the strongest of a latent's examples."""
    return max(1, min(9, round(9 * value / largest))) if largest > 0 else 5

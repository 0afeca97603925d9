"""Where pages of the browser are, for pages that link to them, and how strong marks are."""

from __future__ import annotations

__all__ = ["BROWSER", "coder_slug", "latent_page", "shade"]

BROWSER = "browse"
"""Name of the folder of pages of latents, beside a report."""
_IN_A_FOLDER = 1000
"""Pages of latents that are in one folder: file systems are slow with many."""


def coder_slug(name: str, run: str = "") -> str:
    """Name of a coder's folder in a browser.

    >>> coder_slug("layers.3.mlp/sae-k32", "a/run")
    'a~run~layers.3.mlp~sae-k32'
    """
    return (f"{run}/{name}" if run else name).replace("/", "~")


def latent_page(latent: int) -> str:
    """Where the page of a latent is in its coder's folder.

    >>> latent_page(12_345)
    '12/12345.html'
    """
    return f"{latent // _IN_A_FOLDER}/{latent}.html"


def shade(value: float, largest: float) -> int:
    """Strength of a mark, 1 to 9, of which 9 is the strongest of a latent's examples."""
    return max(1, min(9, round(9 * value / largest))) if largest > 0 else 5

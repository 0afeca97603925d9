"""What a browser shows. Imports neither torch nor zarr."""

from __future__ import annotations

from bsc.config import Config
from bsc.counts import parse_count
from bsc.options import option

__all__ = ["BrowseConfig"]

_SHOWN = "What is shown"


class BrowseConfig(Config):
    """What a browser shows, and with it how large its folder is."""

    coders: tuple[str, ...] = option(
        (), "Coders, by name or pattern; several times.", _SHOWN, shown="all", metavar="GLOB"
    )
    latents: int | None = option(
        None,
        "Latents of each coder that get a page, at even ranks of the firing rate.",
        _SHOWN,
        ge=1,
        parser=parse_count,
        shown="all",
    )
    contexts: int = option(2, "Contexts of each tenth of a latent's firings.", _SHOWN, ge=1, le=16)

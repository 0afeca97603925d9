"""Writing the pages of a coder, by as many processes as there are cores.

A page is made of what was read before, so the processes are forked from this one, share its memory
and compute with nothing but Python and numpy, as the workers of a DataLoader do. Where a process
cannot be forked, or there are few pages, this one writes them all.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

from bsc.eval.browse.pages import CoderPages
from bsc.eval.report.links import latent_page

__all__ = ["Written", "write_pages", "write_text"]

_AT_ONCE = 128
"""Pages that a process writes before it says so."""
_FEW = 512
"""Fewer pages than this are not worth another process."""
_MOST = 16
"""Processes."""


class Written(NamedTuple):
    """Some pages that were written."""

    words: dict[int, str]
    """By latent, what a search in contexts looks through."""
    size: int
    """Bytes."""


def write_text(path: Path, text: str) -> int:
    """Write a file and its folder, and say how many bytes it has."""
    raw = text.encode()
    try:
        path.write_bytes(raw)
    except FileNotFoundError:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(raw)
    return len(raw)


def write_pages(pages: CoderPages, folder: Path) -> Iterator[Written]:
    """Write the page of every latent into the folder of a coder, some at a time, in any order.

    Raises:
        OSError: one cannot be written.
    """
    parts = [pages.latents[i : i + _AT_ONCE] for i in range(0, len(pages.latents), _AT_ONCE)]
    workers = min(_MOST, _cores(), len(parts))
    if workers < 2 or len(pages.latents) < _FEW or sys.platform != "linux":
        yield from (_write(pages, folder, part) for part in parts)
        return
    _shared[:] = [lambda part: _write(pages, folder, part)]
    try:
        with ProcessPoolExecutor(workers, multiprocessing.get_context("fork")) as pool:
            for done in as_completed([pool.submit(_in_a_process, part) for part in parts]):
                yield done.result()
    finally:
        _shared.clear()


_shared: list[Callable[[Sequence[int]], Written]] = []
"""What forked processes call: they have it from this one, so that nothing is sent to them."""


def _in_a_process(latents: Sequence[int]) -> Written:
    return _shared[0](latents)


def _write(pages: CoderPages, folder: Path, latents: Sequence[int]) -> Written:
    words, size = {}, 0
    for shown in map(pages.page, latents):
        size += write_text(folder / latent_page(shown.latent), shown.html)
        words[shown.latent] = shown.words
    return Written(words, size)


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1

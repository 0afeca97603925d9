"""A signal to stop that lets training finish its step and write a checkpoint."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from bsc.progress import console

__all__ = ["asked_to_stop"]


@contextmanager
def asked_to_stop(going_on: str) -> Iterator[threading.Event]:
    """Set by Ctrl-C or SIGTERM, so that a step is finished and a checkpoint written first.

    A second signal has its usual effect.

    Args:
        going_on: command that goes on, to be told.
    """
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}

    def ask(number: int, frame: object) -> None:
        stop.set()
        console.print(f"stopping after this step; `{going_on}` goes on from there")
        for s, handler in before.items():
            signal.signal(s, handler)

    for s in before:
        signal.signal(s, ask)
    try:
        yield stop
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)

"""An iterator that works ahead in a thread of its own."""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Iterator
from typing import Generic, TypeVar

__all__ = ["prefetched"]

T = TypeVar("T")


class _End(Generic[T]):
    def __init__(self, error: BaseException | None) -> None:
        self.error = error


def prefetched(source: Iterator[T], ahead: int) -> Generator[T, None, None]:
    """The same items; up to `ahead` of them are made before they are asked for.

    What `source` raises is raised here, in its place. Closing the generator ends the thread.
    """
    items: queue.Queue[T | _End[T]] = queue.Queue(maxsize=ahead)
    stopped = threading.Event()

    def put(item: T | _End[T]) -> None:
        while not stopped.is_set():
            try:
                items.put(item, timeout=0.1)
                return
            except queue.Full:
                continue

    def work() -> None:
        try:
            for item in source:
                put(item)
                if stopped.is_set():
                    return
            put(_End(None))
        except BaseException as error:
            put(_End(error))
        finally:
            if isinstance(source, Generator):
                source.close()

    thread = threading.Thread(target=work, name="prefetch", daemon=True)
    thread.start()
    try:
        while True:
            item = items.get()
            if isinstance(item, _End):
                if item.error is not None:
                    raise item.error
                return
            yield item
    finally:
        stopped.set()
        thread.join()

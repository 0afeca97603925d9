"""Between the model and the disk: host buffers that are filled and written in turn.

The model's thread fills a slot with the rows of a block, sorted by shard, and goes on; threads
write them. There are two slots, so one is written while the other is filled. When both are in use
the model waits: nothing is dropped. On CUDA buffers are pinned and copies run on a stream of their
own, beside the next forward pass.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import torch

__all__ = ["Slot", "Staging"]

SLOTS = 2
MAX_THREADS = 8
T = TypeVar("T")


class Slot:
    """Host buffers for the rows of one block of every array."""

    def __init__(self, stream: torch.cuda.Stream | None) -> None:
        self._buffers: dict[str, torch.Tensor] = {}
        self._stream = stream
        self._copied: torch.cuda.Event | None = None
        self._order: tuple[torch.Tensor, torch.Tensor] | None = None
        """The order of the block, here and on the device."""
        self.jobs = 0

    def fill(self, name: str, values: torch.Tensor, order: torch.Tensor | None) -> torch.Tensor:
        """Put rows into the buffer of an array, in `order`: one gather, one copy to the host.

        Returns:
            The rows on the host; on CUDA only whole after `wait`.
        """
        buffer = self._buffers.get(name)
        if buffer is None or len(buffer) < len(values):
            pinned = self._stream is not None
            buffer = torch.empty(values.shape, dtype=values.dtype, pin_memory=pinned)
            self._buffers[name] = buffer
        out = buffer[: len(values)]
        if values.device.type != "cuda" or self._stream is None:
            if order is None:
                out.copy_(values)
            else:
                torch.index_select(values, 0, order, out=out)
            return out
        if order is not None:
            if self._order is None or self._order[0] is not order:  # once for all arrays
                self._order = order, order.to(values.device, non_blocking=True)
            values = values.index_select(0, self._order[1])
        self._stream.wait_stream(torch.cuda.current_stream(values.device))
        with torch.cuda.stream(self._stream):
            out.copy_(values, non_blocking=True)
            values.record_stream(self._stream)
        return out

    def filled(self) -> None:
        """Say that every array of the block has been put in."""
        if self._stream is not None:
            # Threads that wait for it sleep; by default they would spin.
            self._copied = torch.cuda.Event(blocking=True)
            self._order = None
            self._copied.record(self._stream)

    def wait(self) -> None:
        """Wait until the rows are on the host; for the writing threads."""
        if self._copied is not None:
            self._copied.synchronize()


class Staging:
    """The slots and the threads that write from them. Work of one lane runs in order."""

    def __init__(self, lanes: int, device: torch.device) -> None:
        """Start the threads.

        Args:
            lanes: independent sequences of work, one per array.
            device: where rows come from.
        """
        stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._free = [Slot(stream) for _ in range(SLOTS)]
        self._ready = threading.Condition()
        self._error: BaseException | None = None
        n_threads = max(1, min(lanes, MAX_THREADS, os.cpu_count() or 1))
        self._threads = [
            ThreadPoolExecutor(1, thread_name_prefix=f"write-{i}") for i in range(n_threads)
        ]

    def slot(self) -> Slot:
        """An empty slot; waits until there is one.

        Raises:
            OSError: a thread failed to write.
        """
        with self._ready:
            self._ready.wait_for(lambda: self._free or self._error)
            self.check()
            return self._free.pop()

    def check(self) -> None:
        """Raise what a thread ran into."""
        if self._error is not None:
            raise self._error

    def submit(self, works: Sequence[Callable[[], T]], slot: Slot | None = None) -> list[Future[T]]:
        """Queue a piece of work per lane; the slot is free again when the last one is done."""
        if slot is not None:
            slot.jobs = len(works)  # all of them, before the first can end
        return [
            self._threads[lane % len(self._threads)].submit(self._run, work, slot)
            for lane, work in enumerate(works)
        ]

    def _run(self, work: Callable[[], T], slot: Slot | None) -> Any:
        try:
            if self._error is not None:  # nothing after a failure may be committed
                raise self._error
            return work()
        except BaseException as error:
            with self._ready:
                self._error = self._error or error
                self._ready.notify_all()
            raise
        finally:
            if slot is not None:
                with self._ready:
                    slot.jobs -= 1
                    if slot.jobs == 0:
                        self._free.append(slot)
                        self._ready.notify_all()

    def close(self) -> None:
        """Drop work that waits, and wait for the threads to end."""
        for thread in self._threads:
            thread.shutdown(wait=True, cancel_futures=True)

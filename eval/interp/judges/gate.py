"""How many requests to a judge may be under way, and from when on.

Additive increase, multiplicative decrease: halved when the judge says that it is too much, one more
for every round that goes well.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque

__all__ = ["Gate"]


class Gate:
    """Requests go through one by one and are counted until they are done."""

    def __init__(self, most: int) -> None:
        """Begin with `most` at a time."""
        self.most, self.limit = most, most
        self._under_way = 0
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._not_before = 0.0
        self._cut_at = 0.0
        self._well = 0

    async def enter(self) -> None:
        """Wait until one more request may be under way, and count it."""
        while self._under_way >= self.limit:
            # Somebody is under way, and wakes who waits when he leaves.
            turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.append(turn)
            await turn
        self._under_way += 1
        while (pause := self._not_before - time.monotonic()) > 0:
            await asyncio.sleep(pause)

    def leave(self) -> None:
        """It is not under way any more."""
        self._under_way -= 1
        self._wake()

    def _wake(self) -> None:
        room = self.limit - self._under_way
        while room > 0 and self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(None)
                room -= 1

    def slow_down(self, began: float, after: float | None) -> None:
        """A request that was sent at `began` was too much; wait `after` seconds if it says so."""
        self._well = 0
        if began > self._cut_at:
            # Once for all requests that were under way together.
            self.limit = max(1, self.limit // 2)
            self._cut_at = time.monotonic()
        if after is not None:
            self._not_before = max(self._not_before, time.monotonic() + after)

    def went_well(self) -> None:
        """A request was answered."""
        self._well += 1
        if self._well >= self.limit < self.most:
            self.limit, self._well = self.limit + 1, 0
            self._wake()

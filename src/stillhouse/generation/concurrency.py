"""Adapts the number of concurrent requests to how the endpoint answers (AIMD)."""

from __future__ import annotations

import asyncio
import math
from collections import deque

FIRST_LIMIT = 16.0
"""Concurrent requests at the start; doubled with every round of answers until a 429."""
_LAST = 64
"""Number of recent outcomes among which timeouts are counted."""


def now() -> float:
    """The running event loop's time, in seconds."""
    return asyncio.get_running_loop().time()


class AdaptiveLimit:
    """A limit on the requests in flight that grows with answers and is halved after a 429.

    Until the first 429, each answer adds one, which doubles the limit in each round; after it, a
    whole round of answers adds one. A burst of 429s halves the limit once: requests that were sent
    before the last halving are ignored. Retry-After pauses all requests. If timeouts are more than
    a third of the recent outcomes, they count as 429s, because requests are then waiting in a slow
    server's queue.
    """

    def __init__(self, most: int) -> None:
        self.most, self.limit = most, min(FIRST_LIMIT, float(most))
        self.at_once = 0
        self._growing_fast = True
        self._halved, self._closed_until = -math.inf, 0.0
        self._late: deque[bool] = deque(maxlen=_LAST)  # of requests sent since the last halving
        self._waiting: deque[asyncio.Future[None]] = deque()

    async def acquire(self) -> float:
        """Wait until a request may be sent; return the current time."""
        while True:
            pause = self._closed_until - now()
            if pause > 0:
                await asyncio.sleep(pause)
            elif self.at_once < int(self.limit):
                self.at_once += 1
                return now()
            else:
                place = asyncio.get_running_loop().create_future()
                self._waiting.append(place)
                await place

    def release(self) -> None:
        self.at_once -= 1
        for _ in range(int(self.limit) - self.at_once):
            while self._waiting and self._waiting[0].done():
                self._waiting.popleft()
            if not self._waiting:
                break
            self._waiting.popleft().set_result(None)

    def answered(self) -> None:
        self._late.append(False)
        self.limit = min(self.most, self.limit + (1.0 if self._growing_fast else 1.0 / self.limit))

    def throttled(self, sent: float, pause: float) -> None:
        """Record a 429 for a request sent at `sent`, and wait at least `pause` seconds."""
        self._growing_fast = False
        self._closed_until = max(self._closed_until, now() + pause)
        if sent > self._halved:
            self.limit, self._halved = max(1.0, self.limit / 2), now()
            self._late.clear()

    def timed_out(self, sent: float) -> None:
        """Record a timeout of a request sent at `sent`."""
        if sent > self._halved:
            self._late.append(True)
            if 3 * sum(self._late) > len(self._late):
                self.throttled(sent, 0.0)

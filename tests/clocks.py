"""Time that passes only when a test says so, so that no test depends on how busy the machine is."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class Clock:
    """Stands in for the module `time`. tick: seconds that pass with each reading."""

    def __init__(self, *, now: float = 0.0, tick: float = 0.0) -> None:
        self.now, self.tick = now, tick

    def read(self) -> float:
        self.now += self.tick
        return self.now

    time = monotonic = perf_counter = read


class _Selector(selectors.DefaultSelector):
    """Advances the time where a real selector would wait for a timer."""

    now = 0.0

    def select(self, timeout: float | None = None) -> Any:
        if timeout is None or timeout <= 0:
            return super().select(timeout)
        ready = super().select(0)
        if not ready:
            self.now += timeout
        return ready


class _Loop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self._time = _Selector()
        super().__init__(self._time)

    def time(self) -> float:
        return self._time.now


def run_at_once(work: Coroutine[Any, Any, T]) -> tuple[T, float]:
    """Like asyncio.run, but sleeping takes no time. Also returns the loop's time at the end."""
    with asyncio.Runner(loop_factory=_Loop) as runner:
        return runner.run(work), runner.get_loop().time()

"""Progress of long work: a rich bar on a terminal, otherwise an occasional plain line."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
from rich.progress import Task as RichTask
from rich.text import Text

from stillhouse.terminal import Terminal

console = Terminal(stderr=True)
PLAIN_SECONDS = 15.0
"""Seconds between progress lines without a terminal."""

Advance = Callable[[int], None]


@dataclass(frozen=True)
class Work:
    """The state of a progress bar: `done` of `total` units after `seconds`."""

    name: str
    done: int
    total: int
    unit: str
    seconds: float


_observers: list[Callable[[Work], None]] = []


@contextmanager
def observed(observer: Callable[[Work], None]) -> Iterator[None]:
    """Call `observer` whenever a bar starts or advances inside the block."""
    _observers.append(observer)
    try:
        yield
    finally:
        _observers.remove(observer)


class _Rate(ProgressColumn):
    def __init__(self, unit: str) -> None:
        super().__init__()
        self.unit = unit

    def render(self, task: RichTask) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{_digits(speed)} {self.unit}/s")


def _digits(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"


@contextmanager
def bar(description: str, total: int, unit: str = "tokens") -> Iterator[Advance]:
    """Show progress toward `total` units; call the yielded `advance(units)` as work is done."""
    shown = _terminal_bar if console.is_terminal else _plain_lines
    with shown(description, total, unit) as advance:
        began, done = time.monotonic(), 0

        def report(units: int) -> None:
            nonlocal done
            done += units
            for observer in _observers:
                observer(Work(description, done, total, unit, time.monotonic() - began))

        def both(units: int) -> None:
            advance(units)
            report(units)

        report(0)
        yield both


@contextmanager
def _terminal_bar(description: str, total: int, unit: str) -> Iterator[Advance]:
    columns = (
        TextColumn("{task.description:<24}", markup=False),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        _Rate(unit),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(description, total=total)
        yield lambda units: progress.advance(task, units)


@contextmanager
def _plain_lines(description: str, total: int, unit: str) -> Iterator[Advance]:
    started = shown = time.monotonic()
    done = 0

    def say(now: float) -> None:
        rate = done / max(now - started, 1e-9)
        left = (total - done) / rate if rate > 0 else 0.0
        console.write_line(
            f"{description}: {done:,}/{total:,} {unit}, {_digits(rate)} {unit}/s, "
            f"{left:,.0f} s left"
        )

    def advance(units: int) -> None:
        nonlocal done, shown
        done += units
        now = time.monotonic()
        if now - shown >= PLAIN_SECONDS:
            shown = now
            say(now)

    yield advance
    now = time.monotonic()
    if now - started >= PLAIN_SECONDS:
        say(now)


def note(message: str) -> None:
    """Print one line for the user to stderr."""
    console.write_line(message)

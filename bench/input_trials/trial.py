"""One trial: an input, the code that reads it, and what may come out.

The expectation comes from the generator that wrote the input, never from the code that reads it.
"""

from __future__ import annotations

import io
import os
import traceback
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

from stillhouse import progress
from stillhouse.errors import StillhouseError

Outcome = Literal[
    "right", "refused", "noted", "silent", "wrongly refused", "unclear", "traceback", "hang"
]
OUTCOMES: tuple[Outcome, ...] = (
    "right", "refused", "noted", "silent", "wrongly refused", "unclear", "traceback", "hang",
)  # fmt: skip
MEANING = {
    "right": "read as the generator meant it",
    "refused": "one error with a place and a way out; the input is defective or not supported",
    "noted": "read, and a note says what was left out or changed",
    "silent": "wrong without a word",
    "wrongly refused": "an error for a sound input",
    "unclear": "an error without a place or without a way out",
    "traceback": "an exception that is no StillhouseError",
    "hang": "not finished in time",
}
BARS: tuple[Outcome, ...] = ("silent", "wrongly refused", "unclear", "traceback", "hang")
"""Outcomes that must not occur."""

Refusal = Literal["never", "may", "must"]


@dataclass(frozen=True)
class Trial:
    """An input that has been written, and how to judge what is made of it.

    name: what is odd about the input. read: runs the code under test. wrong: what is wrong with its
    result, None if it is right. refusal: whether an error is right too, or the only right outcome.
    lost: words of which the notes must contain one, because the input holds something that this
    reader leaves out; empty: nothing has to be left out. excused: words of a note that makes up for
    a wrong result. more_seconds: of processor time, beyond those of its family.
    """

    name: str
    read: Callable[[], Any]
    wrong: Callable[[Any], str | None]
    refusal: Refusal = "never"
    lost: tuple[str, ...] = ()
    excused: tuple[str, ...] = ()
    more_seconds: float = 0.0


@dataclass(frozen=True)
class Result:
    """cpu_seconds: of the trial, with all processes that it started and that have ended."""

    family: str
    number: int
    name: str
    outcome: Outcome
    detail: str = ""
    cpu_seconds: float = field(default=0.0, compare=False)


def judge(trial: Trial) -> tuple[Outcome, str]:
    """The outcome of a trial, and the error, note or difference that decided it."""
    with captured_notes() as notes:
        try:
            result = trial.read()
        except StillhouseError as error:
            return _refused(trial, error)
        except Exception:
            return "traceback", traceback.format_exc(limit=-6)
        problem = trial.wrong(result)
    said = notes.getvalue().strip()
    if problem is not None:
        return ("noted", said) if _mentions(said, trial.excused) else ("silent", problem)
    if trial.lost:
        if _mentions(said, trial.lost):
            return "noted", said
        return "silent", f"no note about any of {', '.join(trial.lost)}"
    return ("silent", "accepted") if trial.refusal == "must" else ("right", said)


def _refused(trial: Trial, error: StillhouseError) -> tuple[Outcome, str]:
    if not error.where or not error.fix:
        return "unclear", str(error)
    return ("wrongly refused" if trial.refusal == "never" else "refused"), str(error)


def _mentions(said: str, words: tuple[str, ...]) -> bool:
    return any(word in said.casefold() for word in words)


@contextmanager
def captured_notes() -> Any:
    """What `progress.note` says meanwhile; native libraries' chatter on stderr is dropped."""
    notes = io.StringIO()
    progress.console.file = notes
    saved, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield notes
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(null)
        progress.console.file = None  # type: ignore[assignment]  # rich: back to stderr


def notes_so_far() -> str:
    """Inside of `captured_notes`: what was noted until now."""
    file = progress.console.file
    return file.getvalue() if isinstance(file, io.StringIO) else ""

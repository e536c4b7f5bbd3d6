"""One trial: an input, the code that reads it, and the outcomes that are allowed.

The expected result comes from the generator that wrote the input, never from the code under test.
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
    "refused": "one error with a place and a fix; the input is defective or not supported",
    "noted": "read, and a note reports what was left out or changed",
    "silent": "wrong, without a message",
    "wrongly refused": "an error for a valid input",
    "unclear": "an error without a place or a fix",
    "traceback": "an exception other than StillhouseError",
    "hang": "not finished in time",
}
BARS: tuple[Outcome, ...] = ("silent", "wrongly refused", "unclear", "traceback", "hang")
"""Outcomes that must not occur."""

Refusal = Literal["never", "may", "must"]


@dataclass(frozen=True)
class Trial:
    """An input that has been written, and how to judge the result.

    name: what is unusual about the input. read: runs the code under test. wrong: describes what is
    wrong with the result, None if it is right. refusal: whether an error is also right, or the only
    right outcome. lost: if the reader leaves out part of the input, the notes must contain one of
    these words. excused: a note with one of these words excuses a wrong result. more_seconds:
    processor time in addition to the family's limit.
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
    """The result of a trial. cpu_seconds: includes child processes that have ended."""

    family: str
    number: int
    name: str
    outcome: Outcome
    detail: str = ""
    cpu_seconds: float = field(default=0.0, compare=False)


def judge(trial: Trial) -> tuple[Outcome, str]:
    """Run a trial; return its outcome, and the error, note, or difference that decided it."""
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
    """Capture the output of `progress.note`; drop what native libraries print to stderr."""
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
    """Inside `captured_notes`: the notes so far."""
    file = progress.console.file
    return file.getvalue() if isinstance(file, io.StringIO) else ""

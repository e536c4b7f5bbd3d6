"""Errors that a user can cause. Each prints one message: what is wrong, where, and what to do."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager

SHOWN = 80
"""The maximum number of characters shown of a value in a message."""


class StillhouseError(Exception):
    """Base of every error a user can cause; the command line prints it without a traceback.

    what: what is wrong. where: the place, such as a file or a recipe's key; None if unknown. fix:
    what to do about it; None if unknown.
    """

    def __init__(self, what: str, *, where: object = None, fix: str | None = None) -> None:
        self.what = what
        self.where = None if where is None else str(where)
        self.fix = fix
        super().__init__(what)

    def __str__(self) -> str:
        lines = [self.what]
        if self.where:
            lines.append(f"  where: {in_one_line(self.where)}")
        if self.fix:
            lines.append(f"  fix:   {self.fix}")
        return "\n".join(lines)


class RecipeError(StillhouseError, ValueError):
    """The recipe cannot be read, or names something that does not exist."""


class DataError(StillhouseError, ValueError):
    """The training or held-out text cannot be used."""


class ModelError(StillhouseError, ValueError):
    """A model or tokenizer is missing, damaged, or incompatible with another."""


class SignalError(StillhouseError, ValueError):
    """A teacher's signal is malformed or belongs to something else."""


class StoreError(StillhouseError, RuntimeError):
    """A signal store cannot be read or written: it is damaged or unfinished, or the disk is
    full."""


class RunError(StillhouseError, RuntimeError):
    """The run folder cannot be used: it is busy, not writable, or the disk is full."""


class TrainingError(StillhouseError, RuntimeError):
    """Training cannot continue: the loss is not finite, or there are no supervised tokens."""


class LostProcessError(TrainingError):
    """Another process of the same torchrun has ended."""


class DeviceError(StillhouseError, RuntimeError):
    """The processes of a torchrun have different devices."""


class EndpointError(StillhouseError, RuntimeError):
    """A teacher's API does not answer: wrong key or model, no server, or no credit."""


@contextmanager
def errors_at(where: str) -> Iterator[None]:
    """Give this place to an error that is raised inside without one."""
    try:
        yield
    except StillhouseError as error:
        error.where = error.where or where
        raise


def in_one_line(text: object) -> str:
    """Replace line breaks with symbols, so that a path containing one cannot fake another line."""
    return "␊".join(str(text).splitlines())


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or the name of its type if it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def process_failure(status: int, output: str) -> str:
    """Why a process failed, on one line: the signal that ended it, the last line of its error
    output, or its exit status."""
    if status < 0:
        name = signal.Signals(-status).name
        cause = ", most likely because memory ran out" if name == "SIGKILL" else ""
        return f"{name}{cause}"
    return [f"exit status {status}", *output.strip().splitlines()][-1]


def shown(text: object) -> str:
    """Format a key or scalar for a message: printable, and shortened if it is long."""
    if isinstance(text, int) and abs(text) >= 10**SHOWN:
        return f"an integer of more than {SHOWN} digits"
    written = str(text)
    if len(written) > SHOWN:
        written = f"{written[:SHOWN]}..."
    return written if written.isprintable() else repr(written)[1:-1]


def shown_value(value: object) -> str:
    """Like `shown`, but with quotes around text."""
    return repr(value) if isinstance(value, str) and len(value) <= SHOWN else shown(value)

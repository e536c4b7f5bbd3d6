"""The command line's final messages and exit statuses."""

from __future__ import annotations

import io
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import NoReturn

from stillhouse.cli.options import say
from stillhouse.disk_errors import disk_error
from stillhouse.errors import LostProcessError, RunError, StillhouseError
from stillhouse.launch import leads, may_report
from stillhouse.process_watch import lost_process_found, reports_lost_process, was_lost


def open_standard_streams() -> None:
    """Open /dev/null in place of closed standard streams. Otherwise the next file that is opened
    would get a closed stream's number, and whatever a library prints would end up in it.

    Characters that a stream's encoding lacks are written as escapes.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number
    if sys.stdin is None:  # it was closed
        sys.stdin = open(0, closefd=False)  # noqa: SIM115 (for the rest of the process)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # of any encoding
            stream.reconfigure(errors="backslashreplace")


def end_stopped(number: int) -> NoReturn:
    """Report that a signal stopped the command, and exit with the signal's status."""
    # torchrun or this process itself sends SIGTERM when another process has died.
    if number == signal.SIGTERM and was_lost():
        if reports_lost_process():
            say(f"error: {lost_process_found()}")
    elif leads():
        say("stopped. Finished work is kept: run the same command to resume.")
    sys.exit(128 + number)


def end_with(error: Exception) -> NoReturn:
    """Report what went wrong, unless another process on this machine already has, and exit."""
    match error:
        case BrokenPipeError():
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        case LostProcessError():
            if reports_lost_process():
                say(f"error: {error}")
        case _ if not may_report():
            pass
        case StillhouseError():
            say(f"error: {error}")
        case MemoryError():
            say("error: out of memory\n  fix:   lower train.micro_batch_size or data.context")
        case _:
            problem = disk_error(error, None) or _deleted_current_folder()
            if problem is None:
                _say_bug()
            say(f"error: {problem}")
    sys.exit(1)


def _deleted_current_folder() -> RunError | None:
    try:
        Path.cwd()
    except FileNotFoundError:
        return RunError(
            "the current folder was deleted",
            fix="change to another folder (`cd`) and run the same command again",
        )
    return None


def _say_bug() -> NoReturn:
    traceback.print_exc()
    say(
        "error: this is a bug in Stillhouse, not in your recipe. Finished work is kept.\n"
        "  fix:   report the lines above together with the output of `stillhouse doctor`"
    )
    sys.exit(2)

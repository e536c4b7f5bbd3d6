"""Signals that stop a run, raised as an exception that neither `__del__` nor torch can swallow."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from typing import Any

from stillhouse.launch import world_size
from stillhouse.process_watch import lost_process_found, reports_lost_process, was_lost

NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""SIGHUP is sent when a terminal is closed."""
WAITING_SECONDS = 4.0


class Stopped(BaseException):
    """One of NUMBERS was received. Not a KeyboardInterrupt: typer turns that into a silent exit."""

    def __init__(self, number: int) -> None:
        self.number = number


def raise_on_signals() -> None:
    """Make these signals raise Stopped in the main thread, except SIGHUP under nohup."""
    for number in NUMBERS:
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _stop)
    sys.unraisablehook = _not_raised
    if world_size() > 1:
        _end_while_waiting()


def hold_further_signals() -> None:
    """Only record further signals, so that they cannot interrupt the final message."""
    for number in NUMBERS:
        if signal.getsignal(number) == _stop:
            signal.signal(number, _hold)


def ignore_further_signals() -> None:
    """Let further signals end the process silently: its final message has been printed."""
    for number in NUMBERS:
        if signal.getsignal(number) in (_stop, _hold):
            signal.signal(number, signal.SIG_DFL)


def received() -> int | None:
    """The first signal received, if any."""
    return next(iter(_received), None)


_received: list[int] = []


def _stop(number: int, frame: Any) -> None:
    _received.append(number)
    raise Stopped(number)


def _hold(number: int, frame: Any) -> None:
    _received.append(number)


def _not_raised(unraisable: Any) -> None:
    """Send the signal again if its exception was raised inside `__del__`, where Python drops it."""
    if not isinstance(unraisable.exc_value, Stopped):
        return sys.__unraisablehook__(unraisable)
    main_thread = threading.main_thread().ident
    assert main_thread is not None
    number = unraisable.exc_value.number
    threading.Timer(0.05, signal.pthread_kill, (main_thread, number)).start()
    return None


def _end_while_waiting() -> None:
    """End the process if a signal has no effect: while torch waits for other processes in C++,
    Python cannot raise. Requests in flight have their own handler and time to finish."""
    signals, written = os.pipe()
    os.set_blocking(written, False)
    signal.set_wakeup_fd(written, warn_on_full_buffer=False)

    def watch() -> None:
        while (number := os.read(signals, 1)[0]) not in NUMBERS:
            pass
        time.sleep(WAITING_SECONDS)
        if number == signal.SIGTERM and was_lost() and reports_lost_process():
            sys.stderr.write(f"error: {lost_process_found()}\n")
            sys.stderr.flush()
        os._exit(128 + number)

    threading.Thread(target=watch, daemon=True).start()

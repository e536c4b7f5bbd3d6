"""Runs coroutines from plain functions, safely under signals and in notebooks."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future, wait
from contextlib import suppress
from typing import Any, TypeVar

T = TypeVar("T")


def run_stoppable(
    work: Coroutine[Any, Any, T], on_first_signal: Callable[[], None] = lambda: None
) -> T:
    """Run `work` and return its result.

    Ctrl-C, SIGTERM, or SIGHUP cancels the work and takes effect once the work has ended; a second
    signal cancels it again if it is still running. (A signal handler's exception could get lost
    inside the event loop.) In a notebook, whose event loop already runs in this thread, `work` runs
    in a separate thread.
    """
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return _run_here(work, on_first_signal)
    return _run_in_thread(work)


def _run_here(work: Coroutine[Any, Any, T], on_first_signal: Callable[[], None]) -> T:
    caught: list[int] = []

    async def run() -> T:
        task = asyncio.current_task()
        assert task is not None

        def stop(number: int) -> None:
            if not caught:
                on_first_signal()
            caught.append(number)
            task.cancel()

        loop = asyncio.get_running_loop()
        for number in before:
            loop.add_signal_handler(number, stop, number)
        return await work

    main = threading.current_thread() is threading.main_thread()
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if main else ()
    handlers = {number: signal.getsignal(number) for number in numbers}
    before = {
        n: handler for n, handler in handlers.items() if handler not in (None, signal.SIG_IGN)
    }
    woken = signal.set_wakeup_fd(-1) if main else -1  # the loop sets its own
    try:
        return asyncio.run(run())
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if main:
            signal.set_wakeup_fd(woken, warn_on_full_buffer=False)
        if caught:
            os.kill(os.getpid(), caught[0])


def _run_in_thread(work: Coroutine[Any, Any, T]) -> T:
    """Run the work in a thread; an exception in this thread, such as Ctrl-C's, cancels it."""
    result: Future[T] = Future()
    cancel: Future[Callable[[], object]] = Future()

    async def run() -> T:
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None
        cancel.set_result(lambda: loop.call_soon_threadsafe(task.cancel))
        return await work

    def target() -> None:
        try:
            result.set_result(asyncio.run(run()))
        except BaseException as error:
            result.set_exception(error)

    try:
        threading.Thread(target=target, daemon=True).start()
        wait([result])  # `Thread.join` does not wait again once it has been interrupted
    except BaseException:
        with suppress(TimeoutError):  # the thread was not started
            stop = cancel.result(timeout=10.0)
            with suppress(RuntimeError):  # the loop is closed: the work has ended
                stop()
            wait([result])
        raise
    return result.result()

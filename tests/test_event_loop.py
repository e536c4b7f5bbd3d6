"""Running coroutines from plain functions: results, errors, signals, and notebooks."""

from __future__ import annotations

import asyncio
import os
import signal
import threading

import pytest

from stillhouse.cli.stop_signals import NUMBERS, Stopped
from stillhouse.event_loop import run_stoppable


async def double(number: int) -> int:
    await asyncio.sleep(0)
    if number < 0:
        raise ValueError("negative")
    return 2 * number


def test_results_and_errors_are_passed_on_with_and_without_a_running_loop() -> None:
    async def cell(number: int) -> int:
        return run_stoppable(double(number))

    assert run_stoppable(double(2)) == asyncio.run(cell(2)) == 4
    for call in (lambda: run_stoppable(double(-1)), lambda: asyncio.run(cell(-1))):
        with pytest.raises(ValueError, match="negative"):
            call()


@pytest.fixture
def handled() -> object:
    """Handle signals like the command line, and write them to a pipe whose end is returned."""

    def stop(number: int, _: object) -> None:
        raise Stopped(number)

    before = {number: signal.signal(number, stop) for number in NUMBERS}
    reads, writes = os.pipe()
    os.set_blocking(writes, False)
    fd = signal.set_wakeup_fd(writes)
    yield writes
    signal.set_wakeup_fd(fd)
    for number, handler in before.items():
        signal.signal(number, handler)
    os.close(reads)
    os.close(writes)


@pytest.mark.parametrize("number", NUMBERS)
def test_a_signal_takes_effect_after_the_work_is_canceled(handled: int, number: int) -> None:
    told: list[str] = []

    async def work() -> None:
        os.kill(os.getpid(), number)
        try:
            await asyncio.sleep(600)
        except asyncio.CancelledError:
            told.append("ended")
            raise

    with pytest.raises(Stopped) as stopped:
        run_stoppable(work(), lambda: told.append("waits"))
    assert stopped.value.number == number
    assert told == ["waits", "ended"]
    assert signal.set_wakeup_fd(handled) == handled, "it was not restored"


def test_ctrl_c_in_a_notebook_cancels_the_work(handled: int) -> None:
    told: list[str] = []

    async def work() -> None:
        threading.Timer(0, os.kill, (os.getpid(), signal.SIGINT)).start()
        try:
            await asyncio.sleep(600)
        except asyncio.CancelledError:
            told.append("ended")
            raise

    async def cell() -> None:
        with pytest.raises(Stopped):
            run_stoppable(work())

    asyncio.run(cell())
    assert told == ["ended"]

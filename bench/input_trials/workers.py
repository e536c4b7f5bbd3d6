"""Run trials in worker processes, and kill those that hang."""

from __future__ import annotations

import multiprocessing
import os
import random
import resource
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import psutil

from bench.input_trials.busy import on_busy_cores
from bench.input_trials.trial import Result, Trial, judge

PATIENCE = 6.0
"""A worker is killed after this multiple of its trial's processor time."""
MEMORY = 6 << 30
"""Bytes of address space that reading an input can use, in addition to the process itself."""

MakeTrial = Callable[[random.Random, Path, int], Trial]
"""Writes one input to a folder. Arguments: random generator, folder, number of the trial."""


@dataclass(frozen=True)
class Family:
    """Trials of one kind. module: defines `make(random, folder, number)`. cpu_seconds: limit on the
    processor time for reading one input; building the input is not counted."""

    name: str
    module: str
    cpu_seconds: float


def run_one(family: Family, seed: int, number: int) -> Result:
    """Run one trial in this process. The same arguments produce the same input."""
    make: MakeTrial = import_module(family.module).make
    spent = _cpu_seconds()
    chance = random.Random(f"{family.name} {seed} {number}")
    with tempfile.TemporaryDirectory(prefix="trial-") as scratch:
        os.environ["STILLHOUSE_CACHE"] = f"{scratch}/cache"
        trial = make(chance, Path(scratch), number)
        began = time.process_time()
        outcome, detail = judge(trial)
        if time.process_time() - began > family.cpu_seconds + trial.more_seconds:
            detail = f"{time.process_time() - began:.1f} s of processor time; {outcome}: {detail}"
            outcome = "hang"
    detail = detail.replace(scratch, "").strip()
    return Result(family.name, number, trial.name, outcome, detail, _cpu_seconds() - spent)


def _cpu_seconds() -> float:
    """Processor time of this process, of its finished children, and of the finished children of the
    fork server (`tests.forks`)."""
    found = sum(os.times()[:4])
    server = forkserver._forkserver._forkserver_pid  # type: ignore[attr-defined]
    return found if server is None else found + sum(psutil.Process(server).cpu_times()[:4])


@dataclass
class _Worker:
    """A worker process. ready: it has finished its imports, which can take longer than a trial."""

    process: Any
    pipe: Connection
    job: tuple[Family, int] | None = None
    since: float = field(default_factory=time.monotonic)
    ready: bool = False


def run_all(jobs: Sequence[tuple[Family, int]], seed: int, processes: int = 2) -> Iterator[Result]:
    """Yield the results of all jobs as they finish."""
    waiting = list(reversed(jobs))
    workers = [_started(seed) for _ in range(min(processes, max(1, len(jobs))))]
    try:
        while waiting or any(worker.job for worker in workers):
            for place, worker in enumerate(workers):
                if worker.ready and worker.job is None and waiting:
                    worker.job, worker.since = waiting.pop(), time.monotonic()
                    worker.pipe.send(worker.job)
                elif worker.job and time.monotonic() - worker.since > _patience(worker.job):
                    yield _stopped(worker, f"more than {_patience(worker.job):.0f} s")
                    workers[place] = _started(seed)
            busy = {
                worker.pipe: place
                for place, worker in enumerate(workers)
                if worker.job or not worker.ready
            }
            for pipe in wait(list(busy), timeout=1.0):
                place = busy[pipe]  # type: ignore[index]
                try:
                    result: Result | str | None = workers[place].pipe.recv()
                except EOFError:
                    if not workers[place].ready:
                        raise RuntimeError("a worker died before its first trial") from None
                    result = _stopped(workers[place], "the process died", "traceback")
                    workers[place] = _started(seed)
                if result is None:
                    workers[place].ready = True
                    continue
                if isinstance(result, str):
                    raise RuntimeError(result)
                workers[place].job = None
                yield result
    finally:
        for worker in workers:
            worker.pipe.close()
            if worker.job or not worker.ready:
                worker.process.kill()
            worker.process.join()


def _patience(job: tuple[Family, int]) -> float:
    return on_busy_cores(PATIENCE * job[0].cpu_seconds)


def _stopped(worker: _Worker, detail: str, outcome: Any = "hang") -> Result:
    assert worker.job is not None
    worker.process.kill()
    worker.process.join()
    family, number = worker.job
    return Result(family.name, number, "?", outcome, detail)


def _started(seed: int) -> _Worker:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    # Not a daemon, since daemons cannot start child processes; it exits when the pipe closes.
    process = context.Process(target=_serve, args=(theirs, seed))
    process.start()
    theirs.close()
    return _Worker(process, ours)


def _serve(pipe: Connection, seed: int) -> None:
    """Send None when ready, then run the jobs that arrive through the pipe until it is closed."""
    import datasets
    import torch
    import transformers

    torch.set_num_threads(1)
    have = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (have + MEMORY, resource.RLIM_INFINITY))
    datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    pipe.send(None)
    while True:
        try:
            family, number = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send(run_one(family, seed, number))
        except Exception:
            pipe.send(f"{family.name}:{number} cannot be made\n{traceback.format_exc()}")

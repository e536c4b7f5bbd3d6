"""Processes that tests start and kill, forked from a server that has done the slow imports.

A killed fork leaves behind the same as any killed process. Only imports are not repeated, so a
guarantee about a fresh process needs a test that starts one.
"""

from __future__ import annotations

import atexit
import gc
import json
import multiprocessing
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

os.environ["JE_ARROW_MALLOC_CONF"] = "background_thread:false"  # the server has one thread
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "stillhouse.cli",
        "stillhouse.commands",
        "stillhouse.report.draw_charts",
        "transformers.trainer",
        "transformers.modeling_gguf_pytorch_utils",
        "transformers.models.llama.modeling_llama",
        "tests.replays",
    ]
)


class Fork:
    """`work(*arguments)` in a separate process, with the methods of subprocess.Popen."""

    of_machine: TemporaryDirectory[str] | None = None

    def __init__(
        self,
        work: Callable[..., object],
        *arguments: Any,
        cwd: Path | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._folder = TemporaryDirectory()
        folder = Path(self._folder.name)
        self._stdout, self._stderr = folder / "stdout", folder / "stderr"
        written = (self._stdout, self._stderr)
        start = (work, arguments, written, cwd or Path.cwd(), environment or {})
        self._process = CONTEXT.Process(target=_begin, args=start, daemon=True)
        self._process.start()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait(self, timeout: float | None = None) -> int:
        """The exit status; a signal's is negative."""
        self._process.join(timeout)
        status = self._process.exitcode
        if status is None:
            raise subprocess.TimeoutExpired(str(self._process), timeout or 0)
        return status

    def errors(self) -> str:
        """What it has written to stderr so far."""
        return self._stderr.read_text() if self._stderr.exists() else ""

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait until it ends; what it has written to stdout and stderr."""
        self.wait(timeout)
        return self._stdout.read_text(), self._stderr.read_text()


def _begin(
    work: Callable[..., object],
    arguments: tuple[Any, ...],
    written: tuple[Path, Path],
    cwd: Path,
    environment: Mapping[str, str],
) -> None:
    from stillhouse import process_watch

    gc.freeze()
    patch(process_watch, "GRACE_SECONDS", 1.0)  # most tests of killed processes wait this long
    os.environ.update(environment)
    os.chdir(cwd)
    tempfile.tempdir = None  # that of the environment, not the server's
    for number, file in enumerate(written, start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), number)
    try:
        work(*arguments)
    finally:
        atexit._run_exitfuncs()  # multiprocessing skips them


def patch(owner: object, name: str, value: object) -> None:
    """Set an attribute for the life of the process, since a fork has no `monkeypatch`.

    Raises AttributeError if it does not exist.
    """
    getattr(owner, name)
    setattr(owner, name, value)


def stillhouse(*arguments: str, **options: Any) -> Fork:
    """Run `python -m stillhouse ...` in a fork; exports are replayed in the same process."""
    return Fork(_stillhouse, *arguments, **options)


def _stillhouse(*arguments: str) -> None:
    from stillhouse.cli import main
    from stillhouse.export import fresh_process as script
    from tests import replays

    patch(script, "subprocess", replays.IN_THIS_PROCESS)
    sys.argv = ["stillhouse", *arguments]
    main()


def result_of(work: Callable[..., Any], *arguments: Any) -> Any:
    """What `work(*arguments)` returns in a fork: numbers, text, or lists of them."""
    fork = Fork(_write_result, work, *arguments)
    stdout, stderr = fork.communicate()
    assert fork.wait() == 0, stderr
    return json.loads(stdout)


def _write_result(work: Callable[..., Any], *arguments: Any) -> None:
    sys.stdout.write(json.dumps(work(*arguments)))


def measure_memory(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
    """`subprocess.run(command)` for the command of stillhouse.evaluation.speed."""
    fork = Fork(_measure_memory, *command[3:])
    stdout, stderr = fork.communicate()
    return subprocess.CompletedProcess(command, fork.wait(), stdout, stderr)


def _measure_memory(*arguments: str) -> None:
    from stillhouse.evaluation.speed import main

    main(*arguments)


def two_stillhouse(*arguments: str) -> list[Fork]:
    """Like `torchrun --nproc-per-node 2 -m stillhouse ...`."""
    return two_ranks(_stillhouse, *arguments)


def two_ranks(work: Callable[..., object], *arguments: Any) -> list[Fork]:
    """Two processes with the environment of a torchrun."""
    return ranks(2, work, *arguments)


def ranks(count: int, work: Callable[..., object], *arguments: Any, nodes: int = 1) -> list[Fork]:
    """Processes with the environment of a torchrun, on one machine or as if on several.

    As under torchrun, the processes of a machine share a folder, in which each has its own.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    here = count // nodes
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    common |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(here), "OMP_NUM_THREADS": "1"}
    folders = [TemporaryDirectory() for _ in range(nodes)]
    processes = []
    for rank in range(count):
        folder, local = folders[rank // here], rank % here
        own = {"RANK": str(rank), "LOCAL_RANK": str(local)}
        own["TORCHELASTIC_ERROR_FILE"] = f"{folder.name}/{local}/error.json"
        processes.append(Fork(work, *arguments, environment={**common, **own}))
        processes[-1].of_machine = folder
    return processes

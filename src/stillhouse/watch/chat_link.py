"""The server's link to the process that runs the chat's models, for one request at a time.

A separate process keeps the server small, limits the effect of running out of memory to the chat,
and returns all of the models' memory when it ends.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections import deque
from collections.abc import AsyncGenerator, Coroutine, Mapping
from contextlib import suppress
from typing import Any

from stillhouse import cgroups
from stillhouse.errors import StillhouseError

IDLE_SECONDS = 600.0
"""How long the chat can be unused before its models are unloaded."""
COMMAND = ("-m", "stillhouse.watch.chat_process")
_LINE_BYTES = 4 << 20


def chat_threads() -> int:
    """Return the number of threads for the chat's models: a quarter of the cores that this process
    may use, which leaves most of them to training."""
    return max(1, min([os.cpu_count() or 1, *cgroups.cores()]) // 4)


class ChatBusyError(StillhouseError):
    """Another prompt is being answered."""


class ChatProcess:
    """The chat's process, which is started on the first request. device: cpu or cuda."""

    def __init__(self, device: str = "cpu") -> None:
        self.device = device
        self._process: asyncio.subprocess.Process | None = None
        self._said: deque[str] = deque(maxlen=5)
        self._lock = asyncio.Lock()
        self._number = 0
        self._idle: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def answers(self, request: Mapping[str, Any]) -> AsyncGenerator[dict[str, Any]]:
        """Yield the events of one request; closing the iterator stops its generation.

        Raises ChatBusyError while another request is being answered.
        """
        if self._lock.locked():
            raise ChatBusyError(
                "another prompt is being answered", fix="wait until it finishes, or stop it"
            )
        await self._lock.acquire()
        if self._idle is not None:
            self._idle.cancel()
        self._number += 1
        number, ended = self._number, False
        process = None
        try:
            process = await self._started()
            await self._send(process, {"id": number, **request})
            while (event := await self._read(process)) is not None and "end" not in event:
                yield event
            ended = True
            if event is None:
                yield {"role": "student", "error": await self._why(process)}
        finally:
            if ended or process is None:
                self._release()
            else:
                self._keep(self._stop(process, number))

    async def close(self) -> None:
        """End the process, with its models."""
        process, self._process = self._process, None
        if process is None:
            return
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()

    async def _started(self) -> asyncio.subprocess.Process:
        if self._process is not None and self._process.returncode is None:
            return self._process
        threads = str(chat_threads())
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": threads,
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",
        }
        if self.device == "cpu":
            environment["CUDA_VISIBLE_DEVICES"] = ""
        self._process = process = await asyncio.create_subprocess_exec(
            sys.executable,
            *COMMAND,
            threads,
            self.device,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=environment,
            limit=_LINE_BYTES,
            start_new_session=True,  # Ctrl-C goes to the server, which ends this process
        )
        self._keep(self._listen(process))
        return process

    def _keep(self, work: Coroutine[Any, Any, None]) -> None:
        """Run a task in the background. The event loop itself keeps no reference to its tasks."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _listen(self, process: asyncio.subprocess.Process) -> None:
        """Keep the last lines that the process prints to standard error."""
        assert process.stderr is not None
        with suppress(ValueError):  # a line that is too long
            async for line in process.stderr:
                self._said.append(line.decode(errors="replace").strip())

    async def _send(self, process: asyncio.subprocess.Process, message: Mapping[str, Any]) -> None:
        assert process.stdin is not None
        with suppress(ConnectionError):  # the process has ended, which the next read notices
            process.stdin.write((json.dumps(message) + "\n").encode())
            await process.stdin.drain()

    async def _read(self, process: asyncio.subprocess.Process) -> dict[str, Any] | None:
        """Read the next event; None if the process has ended."""
        assert process.stdout is not None
        line = await process.stdout.readline()
        return json.loads(line) if line.endswith(b"\n") else None

    async def _why(self, process: asyncio.subprocess.Process) -> str:
        """Explain why the process has ended by itself."""
        code = await process.wait()
        if code == -signal.SIGKILL:
            return (
                "the chat's process was killed, most likely because memory ran out: close other "
                "programs, or wait until training finishes"
            )
        said = next((line for line in reversed(self._said) if line), "no message")
        return f"the chat's process ended with exit status {code}: {said}"

    async def _stop(self, process: asyncio.subprocess.Process, number: int) -> None:
        """Stop a generation that nobody reads anymore, and wait until it ends."""
        try:
            await self._send(process, {"stop": number})
            while (event := await self._read(process)) is not None and "end" not in event:
                pass
        finally:
            self._release()

    def _release(self) -> None:
        self._lock.release()
        loop = asyncio.get_running_loop()
        self._idle = loop.call_later(IDLE_SECONDS, self._unload)

    def _unload(self) -> None:
        self._keep(self.close())

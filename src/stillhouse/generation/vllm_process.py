"""vLLM in a process of another Python, in a separate environment."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Any

from stillhouse.errors import ModelError
from stillhouse.generation import vllm_worker

# -P: the script's folder must not be searched for modules.
_SCRIPT = ["-P", str(Path(vllm_worker.__file__))]
_TO_STOP = 30.0
"""Seconds for an idle engine to exit by itself."""


class EngineError(Exception):
    """An error in the other process, in one line."""


def probe_python(python: str) -> dict[str, Any]:
    """`vllm_worker.probe` of another interpreter. Raises ModelError if it cannot be run."""
    try:
        done = subprocess.run(
            [python, *_SCRIPT, "probe"], capture_output=True, text=True, check=False
        )
    except OSError as error:
        raise ModelError(f"{python} cannot be run: {error.strerror}") from None
    try:
        found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    except (ValueError, IndexError):
        last = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
        raise ModelError(f"{python} is no Python of version 3.11 or newer ({last[0]})") from None
    return found


class VllmProcess:
    """A process of `python` that runs vllm_worker.py, leading its own process group.

    options: arguments of vllm.LLM. Raises EngineError: vLLM raised an error, or its process ended.
    """

    def __init__(self, python: str, options: dict[str, Any]) -> None:
        self._process = subprocess.Popen(
            [python, *_SCRIPT],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            start_new_session=True,
        )
        self._idle = True
        try:
            self.window = int(self._ask({"open": options})["window"])
        except BaseException:
            self.close()
            raise

    def generate(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """As `vllm_worker.generate`."""
        answers: list[dict[str, Any]] = self._ask({"generate": rows})["answers"]
        return answers

    def close(self) -> None:
        """Ends vLLM. If it is still busy, its processes are killed."""
        try:
            if self._idle:
                with suppress(EngineError, subprocess.TimeoutExpired):
                    self._send({"stop": True})
                    self._process.wait(_TO_STOP)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            for pipe in (self._process.stdin, self._process.stdout):
                with suppress(OSError):
                    pipe and pipe.close()
            self._process.wait()

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        self._idle = False
        self._send(request)
        replies = self._process.stdout
        assert replies is not None
        # vLLM's other processes may hold the pipe open after the one that writes to it has died.
        while not select.select([replies], [], [], 1.0)[0]:
            if self._process.poll() is not None:
                raise self._ended()
        line = replies.readline()
        if not line.endswith("\n"):
            raise self._ended()
        self._idle = True
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            raise EngineError(reply["error"])
        return reply

    def _send(self, request: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except OSError:
            raise self._ended() from None

    def _ended(self) -> EngineError:
        status = self._process.wait()
        how = f"exit status {status}" if status >= 0 else signal.Signals(-status).name
        return EngineError(f"its process ended: {how}")

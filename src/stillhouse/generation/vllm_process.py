"""Runs vLLM in a separate process, with this Python or one in a separate environment."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stillhouse.errors import ModelError, process_failure
from stillhouse.generation import vllm_worker

# -P: the script's folder must not be searched for modules.
_SCRIPT = ["-P", str(Path(vllm_worker.__file__))]
_TO_STOP = 30.0
"""Seconds for an idle engine to exit by itself."""


class EngineError(Exception):
    """An error in the vLLM process, on one line."""


def probe_python(python: str) -> dict[str, Any]:
    """Run `vllm_worker.probe` in a different interpreter. Raises ModelError if that fails."""
    try:
        done = subprocess.run(
            [python, *_SCRIPT, "probe"], capture_output=True, text=True, check=False
        )
    except OSError as error:
        raise ModelError(f"{python} cannot be run: {error.strerror}") from None
    try:
        return json.loads(done.stdout.strip().splitlines()[-1])
    except (ValueError, IndexError):
        why = process_failure(done.returncode, done.stderr)
        raise ModelError(f"{python} is not Python 3.11 or newer ({why})") from None


class VllmProcess:
    """A process of `python` that runs vllm_worker.py, leading its own process group.

    options: arguments of vllm.LLM. layers: see `vllm_worker.open_llm`. gpu: index of the only GPU
    that it may use; None: all of this process's GPUs. Raises EngineError if vLLM raises an error or
    its process ends.
    """

    def __init__(
        self,
        python: str,
        options: dict[str, Any],
        layers: Sequence[int] = (),
        *,
        gpu: int | None = None,
    ) -> None:
        self._process = subprocess.Popen(
            [python, *_SCRIPT],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
            env=_environment(gpu),
        )
        self._idle = True
        self._received = bytearray()
        try:
            self.window = int(self._ask({"open": options, "layers": list(layers)})["window"])
        except BaseException:
            self.close()
            raise

    def generate(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """See `vllm_worker.generate`."""
        return self._ask({"generate": rows})["answers"]

    def hidden_states(self, prompts: list[list[int]]) -> list[Tensor]:
        """See `vllm_worker.hidden_states`."""
        reply, content = self._ask_bytes({"hidden": prompts})
        rows = torch.frombuffer(content, dtype=getattr(torch, reply["dtype"]))
        return list(rows.view(-1, reply["width"]).split([len(prompt) for prompt in prompts]))

    def load_weights(self, folder: Path) -> None:
        """See `vllm_worker.load_weights`."""
        self._ask({"weights": str(folder)})

    def sleep(self) -> None:
        """See `vllm_worker.sleep`."""
        self._ask({"sleep": True})

    def close(self) -> None:
        """Stop vLLM, killing its processes if it is busy."""
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
        while (end := self._received.find(b"\n")) < 0:
            self._receive()
        reply: dict[str, Any] = json.loads(self._take(end + 1))
        self._idle = "bytes" not in reply
        if "error" in reply:
            raise EngineError(reply["error"])
        return reply

    def _ask_bytes(self, request: dict[str, Any]) -> tuple[dict[str, Any], bytearray]:
        """Like `_ask`, for a reply that is followed by the number of bytes that it declares."""
        reply = self._ask(request)
        while len(self._received) < reply["bytes"]:
            self._receive()
        self._idle = True
        return reply, self._take(reply["bytes"])

    def _take(self, size: int) -> bytearray:
        taken, self._received = self._received[:size], self._received[size:]
        return taken

    def _receive(self) -> None:
        replies = self._process.stdout
        assert replies is not None
        # vLLM's other processes may keep the pipe open after the process that writes to it died.
        while not select.select([replies], [], [], 1.0)[0]:
            if self._process.poll() is not None:
                raise self._ended()
        chunk = os.read(replies.fileno(), 1 << 20)
        if not chunk:
            raise self._ended()
        self._received += chunk

    def _send(self, request: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        except OSError:
            raise self._ended() from None

    def _ended(self) -> EngineError:
        return EngineError(f"its process ended: {process_failure(self._process.wait(), '')}")


def _environment(gpu: int | None) -> dict[str, str]:
    """This process's environment without torchrun's variables, because vLLM's processes form a
    separate group. gpu: index of the only GPU to make visible; None: all."""
    names = set(os.environ)
    if "TORCHELASTIC_RUN_ID" in names:
        ours = ("OMP_NUM_THREADS", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        prefixes = ("TORCHELASTIC_", "MASTER_", "GROUP_", "ROLE_")
        names = {name for name in names if name not in ours and not name.startswith(prefixes)}
    found = {name: os.environ[name] for name in names}
    if gpu is not None:
        visible = found.get("CUDA_VISIBLE_DEVICES")
        found["CUDA_VISIBLE_DEVICES"] = visible.split(",")[gpu].strip() if visible else str(gpu)
    return found

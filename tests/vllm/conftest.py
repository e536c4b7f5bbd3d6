"""Fixtures for a real vLLM, in the environment that `make test-vllm` creates."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
import pytest

from tests import tiny

PYTHON = os.environ.get("STILLHOUSE_VLLM", "")
SMALL_CACHE = {"VLLM_CPU_KVCACHE_SPACE": "1"}
START_SECONDS = 900
SHAPE = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
"""On CPUs, vLLM's attention does not support smaller heads."""


@pytest.fixture(scope="session")
def python() -> str:
    """The interpreter of vLLM's environment."""
    if not PYTHON:
        pytest.skip("STILLHOUSE_VLLM is not set to a Python that has vLLM")
    os.environ.update(SMALL_CACHE)
    return PYTHON


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory, python: str) -> Path:
    """A folder with a teacher. Its LM head is not tied: on CPUs, vLLM packs a tied head, and a
    server does not repack it when its weights change."""
    folder = tmp_path_factory.mktemp("home")
    tiny.save_model(folder / "teacher", tie_word_embeddings=False, **SHAPE)
    (folder / "text.txt").write_text(tiny.text(400))
    return folder


@contextmanager
def serving(model: Path, log: Path, *arguments: str) -> Iterator[str]:
    """Run `vllm serve` on loopback, in its own process group; yield its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(Path(PYTHON).with_name("vllm")), "serve", str(model), "--port", str(port)]
    command += ["--host", "127.0.0.1", "--served-model-name", "tiny", "--dtype", "float32"]
    command += ["--enforce-eager", *arguments]
    # In this mode, anyone who can reach the server can run code on it: listen on loopback only.
    environment = {**os.environ, **SMALL_CACHE, "VLLM_SERVER_DEV_MODE": "1"}
    with log.open("w") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=output, env=environment, start_new_session=True
        )
    address = f"http://127.0.0.1:{port}"
    try:
        _wait(process, address, log)
        yield address
    finally:
        os.killpg(process.pid, 9)
        process.wait()


def _wait(process: subprocess.Popen[bytes], address: str, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        try:
            if httpx2.get(f"{address}/health", timeout=5).status_code == 200:
                return
        except httpx2.HTTPError:
            time.sleep(1)
    pytest.fail(f"vLLM did not start:\n{log.read_text()[-4000:]}")

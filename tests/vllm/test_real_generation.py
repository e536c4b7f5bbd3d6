"""A real vLLM generates text and takes new weights."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from stillhouse.commands import record_signals, synthesize_text
from stillhouse.errors import ModelError
from stillhouse.generation.generator import TokenPrompt
from stillhouse.generation.local_generator import LocalGenerator
from stillhouse.generation.rollout_config import VllmRollouts, VllmServerRollouts
from stillhouse.generation.vllm_process import VllmProcess
from stillhouse.generation.vllm_rollouts import (
    OpenGenerator,
    VllmServer,
    server_rollouts,
    vllm_rollouts,
)
from stillhouse.signals.store import open_store
from stillhouse.teachers.load_model import load_model
from tests import tiny
from tests.generation.test_weight_handover import trained
from tests.vllm.conftest import SHAPE, serving
from tests.vllm.test_real_hidden_states import write

ENDS = frozenset({0})
PROMPTS = [TokenPrompt([5, 6, n], 12, logprobs=True) for n in range(7, 13)]
CLOSE = 1e-3
"""Largest difference between vLLM's and transformers' kernels in float32, in nats per token."""


@pytest.fixture(scope="module")
def server(home: Path, python: str) -> Iterator[dict[str, Any]]:
    with serving(home / "teacher", home / "generate.log") as address:
        yield {"base_url": f"{address}/v1", "model": "tiny"}


@pytest.fixture
def student(home: Path) -> Any:
    """The teacher, with weights changed as if by training."""
    return trained(load_model(home / "teacher", dtype=torch.float32), 0.05)


def prompts(home: Path, name: str) -> dict[str, Any]:
    (home / "prompts.txt").write_text("".join(f"{'a' * (n + 1)}\n" for n in range(6)))
    return {
        "prompts": {"path": "prompts.txt"},
        "sampling": {"temperature": 0.0, "max_tokens": 8},
        "filters": {"truncated": False},
        "out": f"{name}.jsonl",
    }


def test_a_server_returns_prompt_logprobs_and_text_but_no_hidden_states(
    home: Path, server: dict[str, Any]
) -> None:
    encoding = {"kind": "top_k", "k": 4}
    local = record_signals(write(home, "top-local", signals={"encoding": encoding}))
    signals = {"encoding": encoding, "server": server}
    store = record_signals(write(home, "top", signals=signals))
    one, other = (open_store(path).manifest for path in (store, local))
    assert one.rows == other.rows
    assert one.quality.captured_mass == pytest.approx(other.quality.captured_mass, abs=1e-4)
    hidden = {"encoding": {"kind": "hidden"}, "server": server}
    with pytest.raises(ModelError, match="no POST /pooling"):
        record_signals(write(home, "no-pooling", signals=hidden))
    api = {"teacher": {"api": server}}
    assert (
        synthesize_text(
            write(home, "served-text", synthesize=prompts(home, "served") | api)
        ).answered
        == 6
    )


def test_a_server_takes_a_students_weights(
    home: Path, server: dict[str, Any], student: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Must be the last test that uses the server, because it changes the server's weights."""
    weights = str(home / "weights-server")
    section = VllmServerRollouts(kind="vllm_server", weights=weights, tolerance=CLOSE, **server)
    with server_rollouts(section, base=home) as opened:
        assert_generates_like(opened, student)
        monkeypatch.setattr(VllmServer, "load_weights", lambda *_: None)
        assert_stale_weights_are_detected(opened, student)


def test_vllm_in_another_python_generates_the_text_of_a_local_model(
    home: Path, python: str
) -> None:
    vllm = {"python": python, "dtype": "float32", "options": {"enforce_eager": True}}
    section = prompts(home, "in-vllm") | {"teacher": {"vllm": vllm}}
    written = synthesize_text(write(home, "text", synthesize=section))
    here = prompts(home, "local") | {"teacher": {"local": {"precision": "float32"}}}
    local = synthesize_text(write(home, "text-local", synthesize=here))
    assert written.answered == local.answered == 6
    assert texts(written.out) == texts(local.out)


def test_vllm_in_another_python_takes_a_students_weights(
    home: Path, python: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    student = tiny.llama(seed=3, **SHAPE)  # its LM head is tied
    section = VllmRollouts(
        kind="vllm", python=python, dtype="float32", tolerance=CLOSE,
        options={"enforce_eager": True},
    )  # fmt: skip
    folder = home / "weights"
    with vllm_rollouts(section, folder, base=home, seed=0) as opened:
        assert_generates_like(opened, student)  # it starts with these weights
        assert_generates_like(opened, trained(student, 0.05))
        monkeypatch.setattr(VllmProcess, "load_weights", lambda *_: None)
        assert_stale_weights_are_detected(opened, student)


def texts(file: Path) -> list[str]:
    """The answers, without an incomplete last character, which vLLM leaves out."""
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    return [row["messages"][-1]["content"].rstrip("\N{REPLACEMENT CHARACTER}") for row in rows]


def assert_generates_like(opened: OpenGenerator, student: Any) -> None:
    """vLLM generates the student's tokens with the student's log-probabilities."""
    with opened(student, ENDS) as generator:
        written = dict(generator.generate(PROMPTS))
    for number, one in LocalGenerator(student, ENDS).generate(PROMPTS):
        assert list(written[number].ids) == list(one.ids)
        assert written[number].stop == one.stop
        assert written[number].logprobs == pytest.approx(one.logprobs, abs=CLOSE)


def assert_stale_weights_are_detected(opened: OpenGenerator, student: Any) -> None:
    trained(student, 0.05)
    with pytest.raises(ModelError, match="it has different weights"), opened(student, ENDS):
        pass

"""The chat's answers with tiny models; test_watch_browser.py tests the process that runs them."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from stillhouse import cgroups
from stillhouse.config.load_recipe import parse_recipe
from stillhouse.data.chat_prompt import chat_ids
from stillhouse.evaluation.generate import generate
from stillhouse.hardware import choose_precision
from stillhouse.section import recipe_yaml
from stillhouse.watch import chat_link, chat_models
from stillhouse.watch.chat_link import ChatBusyError, ChatProcess
from stillhouse.watch.chat_models import ChatModels
from tests import tiny

pytestmark = pytest.mark.run


@pytest.fixture(autouse=True)
def _in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the models in float32, whatever dtypes this CPU supports natively."""
    precision = choose_precision("float32", "cpu")
    monkeypatch.setattr(chat_models, "choose_precision", lambda *_: precision)


def never() -> bool:
    return False


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A run folder with a trained student, next to its teacher, whose path is relative."""
    raw = tiny.recipe(tmp_path)
    raw["teacher"]["model"] = "teacher"
    root = tmp_path / "run"
    tiny.save_model(root / "stages" / "train-key" / "model", seed=1)
    (root / "recipe.yaml").write_text(recipe_yaml(parse_recipe(raw)))
    return root


def request(root: Path, **changes: Any) -> dict[str, Any]:
    return {
        "id": 1,
        "root": str(root),
        "base": str(root.parent),
        "folders": {"train": str(root / "stages" / "train-key")},
        "prompt": "the cat",
        "turns": [],
        "max_tokens": 6,
        "temperature": 0.0,
        **changes,
    }


def events(
    models: ChatModels, asked: dict[str, Any], stopped: Callable[[], bool] = never
) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    models.answer(asked, found.append, stopped)
    return found


def last(found: list[dict[str, Any]], role: str, key: str) -> str:
    return [event[key] for event in found if event.get("role") == role and key in event][-1]


def test_answers_equal_those_of_an_evaluation(root: Path) -> None:
    found = events(ChatModels(), request(root))
    for role, seed in (("student", 1), ("teacher", 0)):
        (expected,) = generate(tiny.llama(seed), tiny.tokenizer(), ["the cat"], max_new_tokens=6)
        shown = last(found, role, "text")
        assert shown == expected.rstrip("\N{REPLACEMENT CHARACTER}")
        assert last(found, role, "note").startswith("6 tokens, truncated")
    texts = [event["text"] for event in found if event.get("role") == "student" and "text" in event]
    assert len(texts) == 6  # the text grows token by token


def test_models_are_loaded_once(root: Path) -> None:
    models = ChatModels()
    states = [event.get("state") for event in events(models, request(root))]
    assert [state for state in states if state] == [
        "loading the student",
        "the student is answering",
        "loading the teacher",
        "the teacher is answering",
    ]
    again = [event.get("state") for event in events(models, request(root))]
    assert [state for state in again if state] == [
        "the student is answering",
        "the teacher is answering",
    ]


def test_each_model_continues_its_own_conversation(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[dict[str, str]]] = []

    def listed(tokenizer: Any, messages: list[dict[str, str]]) -> list[int]:
        asked.append(messages)
        return chat_ids(tokenizer, messages)

    monkeypatch.setattr(chat_models, "chat_ids", listed)
    turns = [
        {"prompt": "one", "answers": {"teacher": "<think>so</think>T1", "student": "S1"}},
        {"prompt": "two", "answers": {"teacher": "T2"}},
    ]
    events(ChatModels(), request(root, turns=turns, max_tokens=1))
    student, teacher = ([message["content"] for message in messages] for messages in asked)
    assert student == ["one", "S1", "the cat"]
    assert teacher == ["one", "T1", "two", "T2", "the cat"]


def test_a_stop_ends_the_generation_at_the_next_token(root: Path) -> None:
    models, found = ChatModels(), list[dict[str, Any]]()
    models.answer(request(root), found.append, lambda: len(found) > 3)
    texts = [event for event in found if "text" in event]
    assert len(texts) == 2
    assert all(event.get("role", "student") == "student" for event in found)


def test_a_student_that_is_not_trained_yet_is_reported(root: Path) -> None:
    found = events(ChatModels(), request(root, folders={}))
    assert last(found, "student", "error").startswith("the student is not trained yet. wait for")
    assert last(found, "teacher", "text")  # it answers anyway


def test_a_missing_teacher_is_reported(root: Path) -> None:
    (root.parent / "teacher").rename(root.parent / "elsewhere")
    found = events(ChatModels(), request(root))
    assert "teacher" in last(found, "teacher", "error")
    assert last(found, "student", "text")


def test_a_model_that_would_not_fit_is_not_loaded(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cgroups, "memory_left", lambda: [2000, 1000])
    found = events(ChatModels(), request(root))
    for role in chat_models.ROLES:
        assert "1.00\N{NO-BREAK SPACE}kB are free" in last(found, role, "error")


@pytest.mark.parametrize(("full", "kind"), [("cuda", "GPU memory"), ("cpu", "memory")])
def test_a_model_on_a_gpu_has_to_fit_into_both_memories(
    full: str, kind: str, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(chat_models, "default_device", lambda: gpu)

    def free(device: torch.device) -> int:
        return 1000 if device.type == full else 1 << 40

    monkeypatch.setattr(chat_models, "free_memory_bytes", free)
    found = events(ChatModels(), request(root))
    for role in chat_models.ROLES:
        error = last(found, role, "error").replace("\N{NO-BREAK SPACE}", " ")
        assert f"of {kind}, but only 1.00 kB are free" in error


def test_a_missing_gpu_is_reported(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (only,) = events(ChatModels("cuda"), request(root))
    assert only["error"].startswith("PyTorch finds no GPU on this machine")


def test_running_out_of_memory_unloads_the_models(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = ChatModels()
    events(models, request(root))

    def fails(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(chat_models, "LocalGenerator", fails)
    found = events(models, request(root))
    assert "memory ran out" in last(found, "student", "error")
    assert models._speakers == {}


def test_a_prompt_beyond_the_models_context_is_reported(root: Path) -> None:
    found = events(ChatModels(), request(root, prompt="x" * 300))
    assert "the model's context is 256" in last(found, "student", "error")


def test_a_chat_template_that_fails_is_reported(root: Path) -> None:
    template = root / "stages" / "train-key" / "model" / "chat_template.jinja"
    template.write_text("{{ messages[99].content.nothing }}")
    found = events(ChatModels(), request(root))
    assert last(found, "student", "error")
    assert last(found, "teacher", "text")


def test_without_a_chat_template_the_prompt_is_continued(root: Path) -> None:
    words = tiny.tokenizer()
    words.chat_template = None
    student = root / "stages" / "train-key" / "model"
    (student / "chat_template.jinja").unlink()
    words.save_pretrained(student)
    found = events(ChatModels(), request(root))
    (expected,) = generate(tiny.llama(1), words, ["the cat"], max_new_tokens=6)
    assert last(found, "student", "text") == expected.rstrip("\N{REPLACEMENT CHARACTER}")


def test_a_recipe_that_cannot_be_read_is_reported_for_both_models(root: Path) -> None:
    (root / "recipe.yaml").write_text(yaml.safe_dump({"name": "x", "unknown": 1}))
    found = events(ChatModels(), request(root))
    assert len([event for event in found if "error" in event]) == 2


# --- the process ---------------------------------------------------------------------------------

SCRIPT = """
import json, sys
for line in sys.stdin:
    message = json.loads(line)
    if "stop" in message:
        print(json.dumps({"end": message["stop"]}), flush=True)
    elif message["prompt"] == "die":
        print("no such thing", file=sys.stderr)
        sys.exit(3)
    else:
        print(json.dumps({"role": "student", "text": "a"}), flush=True)
        if message["prompt"] != "wait":
            print(json.dumps({"end": message["id"]}), flush=True)
"""


class ScriptChat(ChatProcess):
    """Talks to SCRIPT instead of a process with models."""

    async def _started(self) -> asyncio.subprocess.Process:
        if self._process is None or self._process.returncode is not None:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable, "-c", SCRIPT,
                stdin=-1, stdout=-1, stderr=-1,
            )  # fmt: skip
            self._keep(self._listen(self._process))
        return self._process


async def collected(chat: ChatProcess, prompt: str) -> list[dict[str, Any]]:
    return [event async for event in chat.answers({"prompt": prompt})]


def test_only_one_request_is_answered_at_a_time() -> None:
    async def work() -> None:
        chat = ScriptChat()
        assert await collected(chat, "x") == [{"role": "student", "text": "a"}]
        waiting = chat.answers({"prompt": "wait"})
        assert await anext(waiting) == {"role": "student", "text": "a"}
        with pytest.raises(ChatBusyError):
            await collected(chat, "x")
        await waiting.aclose()  # as if the reader had disconnected
        async with chat._lock:  # free once the process has stopped
            pass
        assert await collected(chat, "x") == [{"role": "student", "text": "a"}]
        await chat.close()

    asyncio.run(work())


def test_a_process_that_ended_is_reported_and_the_next_request_starts_another() -> None:
    async def work() -> None:
        chat = ScriptChat()
        (event,) = await collected(chat, "die")
        assert event["error"].startswith("the chat's process ended with exit status 3")
        assert await collected(chat, "x") == [{"role": "student", "text": "a"}]
        await chat.close()

    asyncio.run(work())


def test_a_killed_process_is_reported_as_out_of_memory() -> None:
    async def work() -> None:
        chat = ScriptChat()
        waiting = chat.answers({"prompt": "wait"})
        await anext(waiting)
        assert chat._process is not None
        chat._process.kill()
        event = await anext(waiting)
        assert "memory ran out" in event["error"]
        await waiting.aclose()
        await chat.close()

    asyncio.run(work())


def test_an_unused_chat_is_unloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_link, "IDLE_SECONDS", 0.0)

    async def work() -> None:
        chat = ScriptChat()
        await collected(chat, "x")
        process = chat._process
        assert process is not None
        await process.wait()
        assert process.returncode == -9

    asyncio.run(work())


def test_the_process_has_few_threads_no_gpu_and_no_network(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    script = "import json, os; print(json.dumps(dict(os.environ)))"
    monkeypatch.setattr(chat_link, "COMMAND", ("-c", script))
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(cgroups, "cores", lambda: [16])

    async def work() -> dict[str, str]:
        chat = ChatProcess()
        process = await chat._started()
        assert process.stdout is not None
        found: dict[str, str] = json.loads(await process.stdout.readline())
        await process.wait()
        return found

    environment = asyncio.run(work())
    assert environment["OMP_NUM_THREADS"] == "4"
    assert environment["CUDA_VISIBLE_DEVICES"] == ""
    assert environment["HF_HUB_OFFLINE"] == "1"

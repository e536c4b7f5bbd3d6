"""Runs and journals for trials to damage; each is created once per process."""

from __future__ import annotations

import shutil
import signal
import tempfile
import time
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from tests import forks, replays, tiny
from tests.classify import toys

import stillhouse
from stillhouse.export import fresh_process
from stillhouse.generation.journal import Journal
from stillhouse.generation.request import Answer, Failure, Request

ANSWERS, FAILURES = 60, 8


@cache
def place() -> Path:
    """A folder that is deleted with the process."""
    folder = tempfile.TemporaryDirectory(prefix="knocks-")
    # A fresh process for each export's replay would take most of the time.
    fresh_process.subprocess = replays.IN_THIS_PROCESS  # type: ignore[assignment, attr-defined]
    place.__dict__["kept"] = folder
    return Path(folder.name)


def stored_recipe(folder: Path, /, **sections: Any) -> dict[str, Any]:
    """A run with a signal store and two exports."""
    if not (folder / "teacher").exists():
        words = tiny.merging_tokenizer()
        tiny.llama(vocab_size=len(words)).save_pretrained(folder / "teacher")
        words.save_pretrained(folder / "teacher")
        (folder / "text.txt").write_text(tiny.text(400))
    return tiny.recipe(
        folder,
        **{
            "signals": {"encoding": {"kind": "threshold", "bytes": 60}},
            "export": {"formats": ["safetensors", "gguf-f16"]},
            "train": {"keep_checkpoints": 3},
            **sections,
        },
    )


@cache
def finished_run() -> Path:
    """The folder of a finished run."""
    raw = stored_recipe(place() / "stored")
    result = stillhouse.run(raw)
    assert result is not None
    return result.folder


@cache
def killed_run() -> Path:
    """The folder of a run that was killed in training, with two complete checkpoints or more."""
    root = place() / "stored" / "killed"
    finished_run()
    recipe = write(stored_recipe(place() / "stored", folder=str(root)), place() / "killed.yaml")
    process = forks.stillhouse("run", str(recipe))
    while not list(root.glob("stages/.train-*/checkpoints/checkpoint-10/complete.json")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    return root


@cache
def classifier_run() -> Path:
    """The folder of a finished classifier."""
    result = stillhouse.run(toys.recipe(_made(place() / "classifier")))
    assert result is not None
    return result.folder


def request(number: int) -> Request:
    messages = ({"role": "user", "content": f"question {number}"},)
    return Request("http://127.0.0.1/v1", "teacher", messages, {"max_tokens": 20})


@cache
def journals() -> dict[str, Path]:
    """Two folders, each with a journal: one closed, one as a killed process leaves it."""
    closed, killed = (_made(place() / f"journal-{name}") for name in ("closed", "killed"))
    with Journal(closed / "answers.sqlite") as journal:
        for number in range(ANSWERS):
            answer = Answer(f"answer {number}: {'word ' * 30}", "stop", None, 10, 5, 0.25, 0.1)
            if number % 3 == 0:
                answer = replace(answer, logprobs=[{"token": "a", "logprob": -0.5}])
            journal.record(request(number), answer)
        for number in range(FAILURES):
            failure = Failure("timeout", "no complete answer", 2, 1.5, 40)
            journal.record_failure(request(100 + number), failure)
        journal.reserve(request(200), 2.0, 50).result()
        for file in closed.iterdir():
            shutil.copy(file, killed)
    return {"closed": closed, "killed": killed}


def write(raw: dict[str, Any], path: Path) -> Path:
    path.write_text(yaml.safe_dump(raw))
    return path


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder

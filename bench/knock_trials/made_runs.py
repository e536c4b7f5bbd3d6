"""Runs and journals for trials to damage, each created once per process."""

from __future__ import annotations

import random
import shutil
import signal
import tempfile
import time
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save
from tests import forks, replays, tiny
from tests.classify import toys

import stillhouse
from stillhouse.checksums import with_hash
from stillhouse.data.data import Data
from stillhouse.export import fresh_process
from stillhouse.generation.journal import Journal
from stillhouse.generation.request import Answer, Failure, Request
from stillhouse.search.trial_log import Journal as TrialLog
from stillhouse.teachers.align_tokens import TokenAligner
from stillhouse.teachers.model_source import resolve_model
from stillhouse.teachers.roots_file import cached_roots
from stillhouse.training.rollouts import Rollout, save_rollouts, window_folder

ANSWERS, FAILURES = 60, 8
IDENTITY = "a student"
"""Identity of the student that wrote the rollouts."""


@cache
def place() -> Path:
    """Return a folder that is deleted when the process ends."""
    folder = tempfile.TemporaryDirectory(prefix="knocks-")
    # Replaying each export in a new process would take most of the time.
    fresh_process.subprocess = replays.IN_THIS_PROCESS  # type: ignore[assignment, attr-defined]
    place.__dict__["kept"] = folder
    return Path(folder.name)


def stored_recipe(folder: Path, /, **sections: Any) -> dict[str, Any]:
    """Return the recipe of a run with a signal store and two exports."""
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
    """Return the folder of a finished run."""
    raw = stored_recipe(place() / "stored")
    result = stillhouse.run(raw)
    assert result is not None
    return result.folder


@cache
def killed_run() -> Path:
    """Return the folder of a run killed in training, with at least two complete checkpoints."""
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
    """Return the folder of a finished classifier run."""
    result = stillhouse.run(toys.recipe(_made(place() / "classifier")))
    assert result is not None
    return result.folder


@cache
def quantized_run() -> Path:
    """Return the folder of a finished run with an int8 export."""
    finished_run()
    folder = place() / "stored"
    quantize = {"kind": "int8", "calibration_tokens": None}
    export = {"formats": ["safetensors"]}
    raw = stored_recipe(folder, folder=str(folder / "int8"), quantize=quantize, export=export)
    result = stillhouse.run(raw)
    assert result is not None
    return result.folder


@cache
def windows() -> Path:
    """Return a folder written by `Data.build`."""
    finished_run()
    folder = place() / "windows"
    text = str(place() / "stored" / "text.txt")
    options: dict[str, Any] = {"documents": "line", "context": 32, "heldout_tokens": 256}
    Data.build(text, tiny.merging_tokenizer(), folder=folder, **options)
    return folder


@cache
def left() -> Path:
    """Return a folder with what killed stages left: label scores and a search's measurements."""
    folder = _made(place() / "left")
    scores = torch.rand(64, 3, generator=torch.Generator().manual_seed(0))
    (folder / "scores").write_bytes(with_hash(save({"scores": scores})))
    journal = TrialLog(folder / "journal")
    for number in range(20):
        found = {"kl": 0.1 * number, "sizes": [4, 8]}
        journal.once(f"candidate {number}", partial(dict, found))
    return folder


@cache
def converted() -> Path:
    """Return a cache with a converted GGUF file and the hashes of files."""
    resolve_model(str(gguf()), base=Path(), cache=_made(place() / "cache"))
    return place() / "cache"


@cache
def rollouts() -> Path:
    """Return a folder with rollouts that a student wrote before a step."""
    folder = _made(place() / "own text")
    chance = random.Random(0)
    written = [
        Rollout(slot, tuple(chance.choices(range(200), k=20)), slot % 4, 8, "stop")
        for slot in range(12)
    ]
    save_rollouts(window_folder(folder, 0), written, IDENTITY)
    return window_folder(folder, 0)


@cache
def cached_maps() -> Path:
    """Return a cache with the roots of two tokenizers."""
    cached_roots(aligner(), _made(place() / "roots"))
    return place() / "roots"


def aligner() -> TokenAligner:
    return TokenAligner(tiny.tokenizer(), tiny.merging_tokenizer())


def gguf() -> Path:
    """Return a GGUF file that does not belong to an export."""
    file = _made(place() / "gguf") / "tiny.gguf"
    if not file.exists():
        shutil.copy(finished_run() / "gguf-f16" / "tiny-f16.gguf", file)
    return file


def request(number: int) -> Request:
    messages = ({"role": "user", "content": f"question {number}"},)
    return Request("http://127.0.0.1/v1", "teacher", messages, {"max_tokens": 20})


@cache
def journals() -> dict[str, Path]:
    """Return two folders with a journal each: one closed, one left by a killed process."""
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

"""Complete tiny runs by several processes, and comparisons of their weights."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

import stillhouse
from stillhouse import hardware
from stillhouse.export import fresh_process
from tests import forks, replays, tiny
from tests.forks import Fork
from tests.teachers.tokenizer_toys import byte_level

TRAIN = {
    "batch_size": 4,
    "max_steps": 6,
    "evaluate_every": 2,
    "checkpoint_every": 2,
    "keep_checkpoints": 3,
    "max_grad_norm": 100,
    "schedule": "constant",
    "precision": "float32",
}
HIDDEN = [{"kind": "logits"}, {"kind": "hidden_states", "weight": 0.1}]
CHUNKS = [{"kind": "logits"}, {"kind": "chunks"}]
HOPS = [{"name": "wide", "ffn_size": 48}, {"name": "narrow", "ffn_size": 32, "layers": 2}]
KINDS: dict[str, dict[str, Any]] = {
    "live": {},
    "stored": {"signals": {"encoding": {"kind": "top_k", "k": 8}}},
    "hidden": {"objective": {"terms": HIDDEN}},
    "cascade": {"cascade": {"hops": HOPS}, "student": {"ffn_size": None}},
    "qat": {"quantize": {"kind": "int8", "qat": {"tokens": 400}}},
    "folded": {"evaluate": {"own_text": {"answers": 6, "max_tokens": 6}}},
}
FOLDED: dict[str, dict[str, Any]] = {
    "folded chunks": {"objective": {"terms": CHUNKS}},
    "folded stored": {"signals": {"encoding": {"kind": "top_k", "k": 8}}},
}
"""More runs in which the teacher has a different tokenizer."""

DATA = {"train_tokens": 3000}
"""Enough text that each of four processes writes a shard of a store."""
MICRO_BATCHES = (1, 2, 4)
"""Windows per micro-batch in the runs by one process."""
OTHER_ORDERS = 4
"""A run may differ from that of one process by this many times `orders_apart`."""


def recipe(inputs: Path, folder: Path, kind: str, **train: object) -> dict[str, Any]:
    """A recipe of one of KINDS or FOLDED. train: additional settings of that section."""
    sections = {"data": DATA, "train": {**TRAIN, **train}, "folder": str(folder)}
    raw = tiny.recipe(inputs, **(KINDS | FOLDED)[kind], **sections)
    if kind == "cascade":
        del raw["student"]["ffn_size"]
    if kind.startswith("folded"):
        raw["student"] = {"start": "pretrained", "model": str(with_other_tokenizer(inputs))}
    return raw


def with_other_tokenizer(inputs: Path) -> Path:
    """A model whose tokens differ from the teacher's."""
    folder = inputs / "other"
    if not folder.exists():
        words = byte_level(300)
        tiny.llama(seed=3, vocab_size=len(words)).save_pretrained(folder)
        words.save_pretrained(folder)
    return folder


def one_thread() -> None:
    """Use one thread. A main process would use all cores, for which these tensors are too small."""
    forks.patch(hardware, "processes_here", lambda: 1)
    torch.set_num_threads(1)


def run_all(recipes: Sequence[dict[str, Any]]) -> None:
    """The work of one process: all runs in turn. Exports are replayed in the same process."""
    one_thread()
    forks.patch(fresh_process, "subprocess", replays.IN_THIS_PROCESS)
    for raw in recipes:
        stillhouse.run(raw)


def finish(processes: Sequence[Fork], seconds: float) -> None:
    """Wait for all processes; if one fails, kill the others, as torchrun does, and raise."""
    deadline = time.monotonic() + seconds
    while any(process.poll() is None for process in processes):
        failed = [process for process in processes if process.poll()]
        if failed or time.monotonic() > deadline:
            for process in processes:
                if process.poll() is None:
                    process.send_signal(signal.SIGKILL)
            said = [process.errors()[-2000:] for process in failed or processes]
            raise AssertionError("\n".join(said))
        time.sleep(0.1)
    assert [process.poll() for process in processes] == [0] * len(processes)


def errors_at_exit(processes: Sequence[Fork]) -> list[str]:
    """Wait for all processes and return what each wrote to standard error. If one fails, the others
    get SIGTERM, as under torchrun."""
    while any(process.poll() is None for process in processes):
        if any(process.poll() for process in processes):
            for process in processes:
                if process.poll() is None:
                    process.send_signal(signal.SIGTERM)
            for process in processes:
                process.wait(timeout=60)
        time.sleep(0.05)
    return [process.errors() for process in processes]


_PATHS = {"open": 0, "os.mkdir": 0, "os.rename": 1}
"""Python's audit events before a file or folder is written, and which argument is its path."""
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def before_writing(pattern: str, act: Callable[[], object]) -> None:
    """In this process, call `act` whenever a file is about to be opened for writing, a folder to be
    created, or either to be renamed, if `pattern` is found in the (new) path."""

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        place = _PATHS.get(event)
        if place is None or (event == "open" and not (arguments[2] or 0) & _WRITES):
            return
        path = arguments[place]
        if isinstance(path, str | os.PathLike) and re.search(pattern, os.fspath(path)):
            act()

    sys.addaudithook(hook)


def trained(folder: Path) -> list[dict[str, Tensor]]:
    """The weights of each untrained student, then those after each training, in order."""
    found = []
    for name in ("student", "train", "qat"):
        stages = [path for path in folder.glob(f"stages/{name}-*") if path.is_dir()]
        stages.sort(key=lambda path: json.loads((path / "manifest.json").read_text())["started"])
        found += [load_file(path / "model" / "model.safetensors") for path in stages]
    return found


def differences(left: Path, right: Path) -> list[float]:
    """The largest difference between the weights of two runs, for each entry of `trained`."""
    ours, theirs = trained(left), trained(right)
    assert len(ours) == len(theirs) > 1
    found = []
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.keys() == other.keys()
        found.append(max(float((mine[name] - other[name]).abs().max()) for name in mine))
    return found


def orders_apart(alone: Path, kind: str) -> list[float]:
    """How much the order of a sum changes the weights, for each entry of `trained`: the largest
    difference between runs by one process with micro-batches of one window and of more."""
    one, *others = (alone / f"{kind} {micro}" for micro in MICRO_BATCHES)
    return [max(each) for each in zip(*(differences(one, other) for other in others), strict=True)]


def too_far(found: Sequence[float], apart: Sequence[float]) -> bool:
    """Whether a run differs from one by one process by more than the order of sums explains."""
    return any(value > OTHER_ORDERS * most for value, most in zip(found, apart, strict=True))


def difference(left: Path, right: Path) -> float:
    return max(differences(left, right))

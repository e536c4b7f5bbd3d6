"""Tiny runs of every kind, the results of an undisturbed run, and the processes that run them."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tests import tiny
from tests.answering import toys as answers
from tests.classify import toys as labels
from tests.forks import Fork
from tests.generation.stub import Reply, Stub

from bench.input_trials.busy import on_busy_cores
from bench.knock_trials import made_runs, moments
from bench.knock_trials.moments import Moment

PROMPTS, AT_ONCE = 24, 4
PATIENCE = 300.0
"""Limit in seconds for an undisturbed run."""
REQUESTS = "requests"
"""Pseudo-part of a run: the requests to its server."""
KEY = re.compile(r"-[0-9a-f]{12}(?=/|$|\.)")
"""Matches the hash in a stage's name, which depends on the server's address."""
TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]


@dataclass(frozen=True)
class Kind:
    """A kind of tiny run. make: returns the recipe for an input folder, run folder, and server URL.

    fresh: start a new Python process that replays exports in another process; other kinds are
    forked from a process that has already imported the libraries. processes: number for torchrun.
    """

    name: str
    make: Callable[[Path, Path, str], dict[str, Any]]
    fresh: bool = False
    processes: int = 1


def _stored(inputs: Path, root: Path, _url: str) -> dict[str, Any]:
    return made_runs.stored_recipe(inputs, folder=str(root))


def _live(inputs: Path, root: Path, _url: str) -> dict[str, Any]:
    return tiny.recipe(inputs, folder=str(root), evaluate={"fine_tuning_baseline": True})


def _plain(inputs: Path, root: Path, _url: str) -> dict[str, Any]:
    return tiny.recipe(inputs, folder=str(root), train={"micro_batch_size": 2})


def _cascade(inputs: Path, root: Path, _url: str) -> dict[str, Any]:
    hops = [{"name": "wide", "ffn_size": 48}, {"name": "narrow", "ffn_size": 32, "layers": 2}]
    train = {"max_steps": 12}
    raw = tiny.recipe(inputs, folder=str(root), cascade={"hops": hops}, train=train)
    raw["student"] = {"start": "pruned", "calibration_tokens": 512}
    return raw


def _classify(inputs: Path, root: Path, _url: str) -> dict[str, Any]:
    return {**labels.recipe(inputs), "folder": str(root)}


def _extract(inputs: Path, root: Path, url: str) -> dict[str, Any]:
    """Extract with a teacher behind an API, without a price or a budget."""
    raw = answers.clean(answers.recipe(inputs, "extract", **answers.api(inputs, url)))
    raw["teacher"]["api"]["concurrency"] = AT_ONCE
    return {**raw, "folder": str(root)}


def _generate(inputs: Path, root: Path, _url: str) -> dict[str, Any]:
    return {**answers.recipe(inputs, "generate"), "folder": str(root)}


def _qat(inputs: Path, root: Path, _url: str) -> dict[str, Any]:
    quantize = {"keep": ["layers.0"], "qat": {"tokens": 1000, "learning_rate": 1e-3}}
    return tiny.recipe(inputs, folder=str(root), quantize=quantize, train={"max_steps": 12})


def _on_policy(inputs: Path, root: Path, _url: str) -> dict[str, Any]:
    own = {
        "prompts": {"path": str(_prompts(inputs))},
        "share": 0.5,
        "window": 2,
        "max_tokens": 8,
        "terms": [{"divergence": "reverse_kl"}],
    }
    return tiny.recipe(inputs, folder=str(root), train={"max_steps": 12, "on_policy": own})


def _other_tokenizer(inputs: Path, root: Path, _url: str) -> dict[str, Any]:
    """Distill from a teacher whose tokens are longer than the student's."""
    if not (inputs / "student").exists():
        words = tiny.merging_tokenizer()
        tiny.llama(vocab_size=len(words)).save_pretrained(inputs / "teacher")
        words.save_pretrained(inputs / "teacher")
        (inputs / "text.txt").write_text(tiny.text(400))
        tiny.save_model(inputs / "student", seed=1, num_hidden_layers=2)
    raw = tiny.recipe(inputs, folder=str(root), train={"max_steps": 12})
    raw["student"] = {"start": "pretrained", "model": str(inputs / "student")}
    return raw


def _prompts(inputs: Path) -> Path:
    prompts = inputs / "prompts.txt"
    if not prompts.exists():
        prompts.write_text("".join(f"question {n}\n" for n in range(PROMPTS)))
    return prompts


def _synthesis(inputs: Path, root: Path, url: str) -> dict[str, Any]:
    raw = tiny.recipe(inputs, folder=str(root), train={"max_steps": 4})
    out = root.with_suffix(".jsonl")
    price = {"input": 10.0, "output": 30.0}
    api = {"base_url": url, "model": "teacher", "concurrency": AT_ONCE, "price": price}
    raw["synthesize"] = {
        "teacher": {"api": api},
        "budget": {"max_usd": 5.0},
        "prompts": {"path": str(_prompts(inputs))},
        "sampling": {"max_tokens": 8},
        "filters": {"truncated": False, "refusals": False},
        "out": str(out),
    }
    sources = [{"kind": "jsonl", "path": str(out)}]
    raw["data"] = {"sources": sources, "context": 64, "heldout_tokens": 256}
    return raw


KINDS = {
    kind.name: kind
    for kind in (
        Kind("live", _live),
        Kind("stored", _stored),
        Kind("classify", _classify),
        Kind("extract", _extract),
        Kind("generate", _generate),
        Kind("cascade", _cascade),
        Kind("synthesis", _synthesis),
        Kind("quantization-aware", _qat),
        Kind("on-policy", _on_policy),
        Kind("another tokenizer", _other_tokenizer),
        Kind("replayed in its own process", _plain, fresh=True),
        Kind("torchrun", _plain, fresh=True, processes=2),
    )
}
SERVED = ("extract", "synthesis")
"""Kinds of runs that send requests to a server."""


# --- their server --------------------------------------------------------------------------------


@dataclass
class Server:
    """Answers each prompt differently and records all requests.

    asked: prompts of each process, in order. delay: seconds until an answer. at: called with the
    number of requests that the current process has sent.
    """

    asked: list[list[str]] = field(default_factory=lambda: [[]])
    delay: float = 0.01
    at: Callable[[int], None] = lambda number: None

    def next_process(self) -> None:
        self.asked.append([])

    def reply(self, number: int, payload: dict[str, Any]) -> Reply:
        prompt = payload["messages"][-1]["content"]
        self.asked[-1].append(prompt)
        self.at(len(self.asked[-1]))
        words = hashlib.sha256(prompt.encode()).hexdigest()
        text = f"answer {words[:20]} to {prompt}"
        if prompt.startswith("About: "):
            text = json.dumps(answers.truth(prompt))
        return Reply(text=text, delay=self.delay)


@contextmanager
def served(kind: Kind, root: Path) -> Iterator[tuple[Path, Server, Stub]]:
    """Yield the recipe's file and the server that it uses."""
    inputs, server = made_runs.place() / f"inputs of {kind.name}", Server()
    inputs.mkdir(exist_ok=True)
    root.parent.mkdir(parents=True, exist_ok=True)
    with Stub(server.reply) as stub:
        raw = kind.make(inputs, root, f"http://127.0.0.1:{stub.port}/v1")
        yield made_runs.write(raw, root.parents[1] / f"{root.name}.yaml"), server, stub


def patience() -> float:
    return on_busy_cores(PATIENCE)


# --- processes -----------------------------------------------------------------------------------


class Started:
    """A process `python -m ARGUMENTS` with the methods of `Fork`."""

    def __init__(self, arguments: list[str], environment: dict[str, str], folder: Path) -> None:
        self._stderr = folder / f"stderr-{time.monotonic_ns()}"
        with self._stderr.open("wb") as stderr:
            self._process = subprocess.Popen(
                [sys.executable, "-m", *arguments], env={**os.environ, **environment},
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=stderr,
                start_new_session=True,
            )  # fmt: skip
        self.pid, self.poll = self._process.pid, self._process.poll
        self.send_signal, self.wait = self._process.send_signal, self._process.wait

    def errors(self) -> str:
        return self._stderr.read_text()


Process = Fork | Started


def start(
    kind: Kind,
    recipe: Path,
    root: Path,
    environment: dict[str, str],
    moment: Moment | None = None,
    counted: Path | None = None,
) -> Process:
    """Start a process for the run. counted: file for the number of writes to each part."""
    work = recipe.parent
    arguments = ["run", "--yes", str(recipe)]
    folders = [str(root.parent), *filter(None, environment.values())]
    environment = {"TMPDIR": "", "STILLHOUSE_CACHE": str(work / "cache"), **environment}
    noted = str(counted) if counted else ""
    if not kind.fresh:
        given = (arguments, folders, moment, noted)
        return Fork(moments.run_in_fork, *given, environment=environment)
    launch = TORCHRUN if kind.processes > 1 else []
    command = moments.command(arguments, folders, moment, noted)
    return Started([*launch, *command], environment, work)


# --- results of an undisturbed run ---------------------------------------------------------------


@dataclass(frozen=True)
class Undisturbed:
    """An undisturbed run. made: see `made_by`. files: see `files_of`. writes: number per part."""

    made: dict[str, list[str]]
    files: Counter[str]
    writes: dict[str, int]
    seconds: float


@cache
def undisturbed(name: str) -> Undisturbed:
    """Run a kind undisturbed, with the same inputs as its disturbed runs."""
    kind, root = KINDS[name], made_runs.place() / "undisturbed" / name / "runs" / "run"
    with served(kind, root) as (recipe, server, _):
        counted = recipe.with_name("writes.json")
        began = time.monotonic()
        process = start(kind, recipe, root, {}, counted=counted)
        assert process.wait(patience()) == 0, process.errors()[-2000:]
        took = time.monotonic() - began
        writes = json.loads(counted.read_text())
        if server.asked[0]:
            writes[REQUESTS] = len(server.asked[0])
    return Undisturbed(made_by(root), files_of(root), writes, took)


def made_by(root: Path) -> dict[str, list[str]]:
    """Hash the tensors of all exports, all GGUF files, and the bought text. The members of a family
    share tensor names, so each name has a list of hashes."""
    found: dict[str, list[str]] = {}
    for file in root.rglob("stages/export*/**/*.safetensors"):
        for name, tensor in load_file(file).items():
            flat = tensor.contiguous().flatten().view(torch.uint8).numpy()
            whole = f"{file.parent.name} {name} {tensor.dtype} {list(tensor.shape)}"
            found.setdefault(whole, []).append(_hash(flat.tobytes()))
    for file in [*root.rglob("stages/export*/**/*.gguf"), *root.parent.glob(f"{root.name}.jsonl")]:
        found.setdefault(file.suffix, []).append(_hash(file.read_bytes()))
    assert found, f"no model in {root}"
    return {name: sorted(hashes) for name, hashes in found.items()}


def files_of(root: Path) -> Counter[str]:
    """Return all names in and next to a run folder, without a store's shards (a killed process
    leaves more and smaller ones) and without hashes that depend on the server's address."""
    folder = root.parent
    paths = [path for path in folder.rglob("*") if not path.match("shards/*.bin")]
    return Counter(KEY.sub("", str(path.relative_to(folder))) for path in paths)


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()

"""Generates continuations with vLLM, for many thousands of prompts or for models on several GPUs,
and reads a model's hidden states.

vLLM does its own batching and reuses the keys and values of common prefixes. It runs in a separate
process, with this Python or, if `python` is set, with a different one.

Shapes: L tokens of a prompt, D hidden width.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from torch import Tensor

from stillhouse.data.turn_end import turn_end
from stillhouse.errors import ModelError
from stillhouse.generation.generator import (
    Continuation,
    TextGenerator,
    TokenPrompt,
    require_chat_template,
)
from stillhouse.generation.vllm_process import EngineError, VllmProcess, probe_python
from stillhouse.generation.vllm_worker import POOLING, probe, reason
from stillhouse.launch import world_size
from stillhouse.progress import note
from stillhouse.teachers.load_model import load_tokenizer
from stillhouse.teachers.model_source import AnyModel, ModelSource, source_of
from stillhouse.vllm_config import VllmEngine

Lack = tuple[Literal["warning", "error"], str, str]
"""The level of a finding, what is missing, and how to fix it."""

TEACHER = "teacher.vllm"
SIGNALS = "signals.vllm"
ROLLOUTS = "train.on_policy.generator"
"""Keys of the sections in which vLLM generates text, records hidden states, or runs the student."""
WITHOUT = {
    TEACHER: "or use `local` or `api` (e.g. with `vllm serve`) instead; answers in the journal do "
    "not need vLLM",
    ROLLOUTS: "or remove train.on_policy.generator to generate in this process",
    SIGNALS: "or remove signals.vllm to load the teacher in this process, or set signals.server to "
    "use a vLLM server",
}
"""How to do without vLLM, by the section's key; TEACHER's also applies to other text teachers."""
OWN_ENVIRONMENT = (
    "python -m venv vllm-env && vllm-env/bin/pip install vllm, then set {}.python: "
    "vllm-env/bin/python"
)


def lacks(section: VllmEngine, base: Path, *, key: str = TEACHER) -> list[Lack]:
    """Requirements of the section that this machine or its `python` lacks.

    Imports neither vLLM nor Ray. base: where a relative `python` starts. key: the section's key.
    """
    python, own = section.interpreter(base), OWN_ENVIRONMENT.format(key)
    without = WITHOUT.get(key, WITHOUT[TEACHER])
    if python is None:
        has, install = probe(), "pip install 'stillhouse[{}]'"
    else:
        try:
            has, install = probe_python(python), f"{python} -m pip install {{}}"
        except ModelError as error:
            return [("error", error.what, own)]
    there = "" if python is None else f" for {python}"
    found: list[Lack] = []
    if not has["vllm"]:
        fix = install.format("vllm")
        if python is None:
            fix += f" here, or in a separate environment ({own})"
        fix += f"; {without}"
        found.append(("error", f"vLLM is not installed{there}", fix))
    if section.executor == "ray" and not has["ray"]:
        names = "vllm,ray" if python is None else "ray"
        fix = f"{install.format(names)} on every machine, or executor: auto on one"
        found.append(("error", f"Ray is not installed{there}", fix))
    gpus = has["gpus"]
    if gpus == 0:
        fix = f"use a machine with a GPU, or vLLM's build for CPUs; {without}"
        found.append(("warning", "this machine has no GPU, which vLLM's usual build needs", fix))
    elif key == ROLLOUTS and world_size() > 1 and section.gpus > 1:
        text = f"{section.gpus} GPUs are requested, but under torchrun, each process has one"
        fix = "remove tensor_parallel and pipeline_parallel, or run without torchrun"
        found.append(("error", text, fix))
    elif section.executor != "ray" and section.gpus > gpus:
        text = f"{section.gpus} GPUs are requested, but this machine has {gpus}"
        fix = "lower tensor_parallel or pipeline_parallel, or set executor: ray on a Ray cluster"
        found.append(("error", text, fix))
    return found


class Writer(Protocol):
    """A vLLM engine. window: maximum tokens of prompt and continuation. Its methods raise whatever
    vLLM raises, or RuntimeError."""

    window: int

    def generate(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """See `vllm_worker.generate`."""
        ...


@dataclass
class VllmGenerator:
    """Generates continuations with a vLLM engine.

    batch: number of prompts passed to the engine at once. stops: ids that end an answer, in
    addition to those in the model's generation config. where: the recipe's key, for messages.
    """

    engine: Writer
    batch: int
    stops: tuple[int, ...] = ()
    where: str = TEACHER

    @property
    def window(self) -> int:
        return self.engine.window

    def generate(self, prompts: Iterable[TokenPrompt]) -> Iterator[tuple[int, Continuation]]:
        """See `Generator`. A continuation's `seconds` are those of its batch."""
        numbered = enumerate(prompts)
        while batch := list(itertools.islice(numbered, self.batch)):
            rows = [{"prompt": list(p.ids), "sampling": self._sampling(p)} for _, p in batch]
            began = time.monotonic()
            with vllm_errors("vLLM stopped", self.where):
                written = self.engine.generate(rows)
            seconds = time.monotonic() - began
            for (number, _), one in zip(batch, written, strict=True):
                yield number, Continuation(**one, seconds=seconds)

    def _sampling(self, prompt: TokenPrompt) -> dict[str, Any]:
        """Arguments of vllm.SamplingParams."""
        return {
            "temperature": prompt.temperature,
            "top_p": prompt.top_p,
            "max_tokens": prompt.max_tokens,
            "seed": prompt.seed if prompt.temperature > 0 else None,
            # 0: only the generated token's.
            "logprobs": 0 if prompt.logprobs else None,
            **({"stop_token_ids": list(self.stops)} if self.stops else {}),
        }


@contextmanager
def opened(
    section: VllmEngine, source: ModelSource, *, base: Path, seed: int
) -> Iterator[TextGenerator[VllmGenerator]]:
    """Run a model in vLLM, which releases its memory at the end of the block.

    Raises ModelError if a package is not installed, there are too few GPUs, or vLLM cannot load the
    model.
    """
    tokenizer = load_tokenizer(source)
    require_chat_template(tokenizer)  # before the weights are loaded
    end = turn_end(tokenizer)
    stops = () if end is None or end.text in end.stops else (end.id,)
    require_vllm(section, base)
    options = engine_options(section, source, seed=seed)
    with closing(start_engine(section, options, base)) as engine:
        yield TextGenerator(VllmGenerator(engine, section.batch, stops), tokenizer)


def require_vllm(section: VllmEngine, base: Path, *, where: str = TEACHER) -> None:
    """Raise ModelError for an error found by `lacks`; print its warnings as notes.

    where: the section's key.
    """
    for level, text, fix in lacks(section, base, key=where):
        if level == "error":
            raise ModelError(text, where=where, fix=fix)
        note(text)


def engine_options(section: VllmEngine, model: AnyModel, *, seed: int) -> dict[str, Any]:
    """Arguments of vllm.LLM for a model."""
    source = source_of(model)
    return {
        "model": str(source.path),
        "trust_remote_code": source.trusted,
        "dtype": section.dtype,
        "seed": seed,
        "tensor_parallel_size": section.tensor_parallel,
        "pipeline_parallel_size": section.pipeline_parallel,
        "distributed_executor_backend": None if section.executor == "auto" else section.executor,
        "max_model_len": section.context,
        "gpu_memory_utilization": section.gpu_memory,
        **section.options,
    }


def start_engine(
    section: VllmEngine,
    options: dict[str, Any],
    base: Path,
    layers: Sequence[int] = (),
    *,
    where: str = TEACHER,
    gpu: int | None = None,
) -> VllmProcess:
    """Start a vLLM process with a model, using `section.python` or this Python.

    layers, gpu: see `VllmProcess`. Raises ModelError.
    """
    python = section.interpreter(base) or sys.executable
    with vllm_errors(f"vLLM cannot load {options['model']}", where):
        return VllmProcess(python, options, layers, gpu=gpu)


@contextmanager
def vllm_errors(what: str, where: str) -> Iterator[None]:
    """Convert any exception from vLLM, including GPU errors, to a ModelError.

    what: the failure, in words. where: the recipe's key.
    """
    try:
        yield
    except ModelError:
        raise
    except Exception as error:
        cause = str(error) if isinstance(error, EngineError) else reason(error)
        sizes = "context or gpu_memory" if where == SIGNALS else "context, gpu_memory, or batch"
        raise ModelError(
            f"{what} ({cause})",
            where=where,
            fix=f"if memory ran out, lower {sizes}; then repeat the command, which resumes",
        ) from error


# --- hidden states -----------------------------------------------------------------------------


@dataclass
class VllmHiddenStates:
    """A source of hidden states in vLLM.

    kept: layers before the last one, in the order in which the engine returns them. last: number of
    the last layer.
    """

    engine: VllmProcess
    described: str
    kept: tuple[int, ...]
    last: int

    @property
    def layers(self) -> frozenset[int]:
        return frozenset(self.kept)

    def read(
        self, prompts: Sequence[list[int]], layers: Sequence[int]
    ) -> list[Mapping[int, Tensor]]:
        """See `HiddenStateSource`."""
        longest = max(map(len, prompts), default=0)
        if longest > self.engine.window:
            raise ModelError(
                f"a document has {longest:,} tokens, but vLLM reads at most {self.engine.window:,}",
                where=SIGNALS,
                fix=f"set signals.vllm.context to at least {longest}, or lower data.context",
            )
        with vllm_errors("vLLM stopped", SIGNALS):
            found = self.engine.hidden_states(list(prompts))
        numbers = (*self.kept, self.last)
        return [
            {
                number: hidden_LD
                for number, hidden_LD in zip(numbers, each.chunk(len(numbers), -1), strict=True)
                if number in layers
            }
            for each in found
        ]


@contextmanager
def opened_hidden_states(
    section: VllmEngine,
    source: ModelSource,
    *,
    base: Path,
    layers: Sequence[int],
    last: int,
    seed: int,
) -> Iterator[VllmHiddenStates]:
    """Run a model in vLLM, which releases its memory at the end of the block.

    layers: layers to read. last: number of the model's last layer. Raises ModelError if a package
    is not installed, there are too few GPUs, or vLLM cannot load the model.
    """
    kept = tuple(sorted(set(layers) - {last}))
    require_vllm(section, base, where=SIGNALS)
    options = {**engine_options(section, source, seed=seed), **POOLING}
    if kept:
        options["enforce_eager"] = True  # hooks do not run in a compiled model
    with closing(start_engine(section, options, base, kept, where=SIGNALS)) as engine:
        yield VllmHiddenStates(engine, f"{source.path.name} in vLLM", kept, last)

"""Continuations from vLLM: for many thousands of prompts, and models of several GPUs.

vLLM batches its input by itself and reuses the keys and values of common prefixes. It runs
in this process or, with `python`, in a process of another interpreter.
"""

from __future__ import annotations

import gc
import itertools
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from stillhouse.data.turn_end import turn_end
from stillhouse.errors import ModelError
from stillhouse.generation.generation_config import VllmEngine
from stillhouse.generation.generator import Continuation, TokenPrompt
from stillhouse.generation.text_generator import TextGenerator, require_chat_template
from stillhouse.generation.vllm_process import EngineError, VllmProcess, probe_python
from stillhouse.generation.vllm_worker import generate, open_llm, probe, reason
from stillhouse.progress import note
from stillhouse.teachers.load_model import load_tokenizer

Lack = tuple[Literal["warning", "error"], str, str]
"""The level of a finding, what is missing, and what to do."""

WITHOUT = "what the journal holds needs no vLLM; `local` and `api` (`vllm serve`) go without it"
OWN_ENVIRONMENT = (
    "python -m venv vllm-env && vllm-env/bin/pip install vllm, then set vllm.python: "
    "vllm-env/bin/python"
)


def lacks(section: VllmEngine, base: Path) -> list[Lack]:
    """Requirements of the section that this machine, or its `python`, lacks. Imports neither vLLM
    nor Ray. base: where a relative `python` starts."""
    python = section.interpreter(base)
    if python is None:
        has, install = probe(), "pip install 'stillhouse[{}]'"
    else:
        try:
            has, install = probe_python(python), f"{python} -m pip install {{}}"
        except ModelError as error:
            return [("error", error.what, OWN_ENVIRONMENT)]
    there = "" if python is None else f" for {python}"
    found: list[Lack] = []
    if not has["vllm"]:
        fix = install.format("vllm")
        if python is None:
            fix += f" here, or in a separate environment ({OWN_ENVIRONMENT})"
        fix += f"; {WITHOUT}"
        found.append(("error", f"vLLM is not installed{there}", fix))
    if section.executor == "ray" and not has["ray"]:
        names = "vllm,ray" if python is None else "ray"
        fix = f"{install.format(names)} on every machine, or executor: auto on one"
        found.append(("error", f"Ray is not installed{there}", fix))
    gpus = has["gpus"]
    if gpus == 0:
        fix = f"use a machine with one, or vLLM's build for CPUs; {WITHOUT}"
        found.append(("warning", "no GPU is here, and vLLM's usual build needs one", fix))
    elif section.executor != "ray" and section.gpus > gpus:
        text = f"{section.gpus} GPUs are requested, and this machine has {gpus}"
        fix = "lower tensor_parallel or pipeline_parallel, or set executor: ray on a Ray cluster"
        found.append(("error", text, fix))
    return found


class Engine(Protocol):
    """window: tokens that it can read and write. Both raise what vLLM raises, or RuntimeError."""

    window: int

    def generate(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]: ...

    def close(self) -> None: ...


class InProcess:
    """vllm.LLM in this process."""

    def __init__(self, options: dict[str, Any]) -> None:
        self._llm, self.window = open_llm(options)

    def generate(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return generate(self._llm, rows)

    def close(self) -> None:
        # The engine ends with the last reference to it, and training needs the memory.
        del self._llm
        gc.collect()


@dataclass
class VllmGenerator:
    """batch: prompts that the engine is given at once. stops: ids that end an answer, besides those
    of the model's generation config."""

    engine: Engine
    batch: int
    stops: tuple[int, ...] = ()

    @property
    def window(self) -> int:
        return self.engine.window

    def generate(self, prompts: Iterable[TokenPrompt]) -> Iterator[tuple[int, Continuation]]:
        """See `Generator`. The seconds of a continuation are those of its batch."""
        numbered = enumerate(prompts)
        while batch := list(itertools.islice(numbered, self.batch)):
            rows = [{"prompt": list(p.ids), "sampling": self._sampling(p)} for _, p in batch]
            began = time.monotonic()
            try:
                written = self.engine.generate(rows)
            # It raises errors of many types, including GPU errors.
            except Exception as error:
                raise _failed("vLLM stopped", error) from error
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
            # 0: only of the generated token.
            "logprobs": 0 if prompt.logprobs else None,
            **({"stop_token_ids": list(self.stops)} if self.stops else {}),
        }


@contextmanager
def opened(
    section: VllmEngine, path: Path, *, base: Path, seed: int, trust_remote_code: bool
) -> Iterator[TextGenerator[VllmGenerator]]:
    """The model in a folder, run by vLLM, which releases its memory at the end.

    Raises ModelError: something is not installed, too few GPUs, or vLLM cannot load the model.
    """
    for level, text, fix in lacks(section, base):
        if level == "error":
            raise ModelError(text, where="teacher.vllm", fix=fix)
        note(text)
    tokenizer = load_tokenizer(path, trust_remote_code=trust_remote_code)
    require_chat_template(tokenizer)  # before the weights are loaded
    options = {
        "model": str(path),
        "trust_remote_code": trust_remote_code,
        "dtype": section.dtype,
        "seed": seed,
        "tensor_parallel_size": section.tensor_parallel,
        "pipeline_parallel_size": section.pipeline_parallel,
        "distributed_executor_backend": None if section.executor == "auto" else section.executor,
        "max_model_len": section.context,
        "gpu_memory_utilization": section.gpu_memory,
        **section.options,
    }
    python = section.interpreter(base)
    try:
        engine = InProcess(options) if python is None else VllmProcess(python, options)
    except Exception as error:
        raise _failed(f"vLLM cannot load {path}", error) from error
    end = turn_end(tokenizer)
    stops = () if end is None or end.text in end.stops else (end.id,)
    try:
        yield TextGenerator(VllmGenerator(engine, section.batch, stops), tokenizer)
    finally:
        engine.close()


def _failed(what: str, error: Exception) -> ModelError:
    cause = str(error) if isinstance(error, EngineError) else reason(error)
    return ModelError(
        f"{what} ({cause})",
        where="teacher.vllm",
        fix="lower context, gpu_memory or batch if memory runs out; answers that arrived are "
        "in the journal",
    )

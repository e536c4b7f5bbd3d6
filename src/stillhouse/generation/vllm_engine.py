"""Answers from vLLM in this process: for many thousands of prompts, and models of several GPUs.

vLLM batches what it is given by itself and keeps what prompts begin with alike. Requests go to it
as token ids, through the tokenizer's own chat template, so that a prompt is what it is elsewhere.
"""

from __future__ import annotations

import gc
import importlib.util
import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from stillhouse.errors import ModelError
from stillhouse.generation.generation_config import VllmEngine
from stillhouse.generation.local_generator import Outcome, prompt_and_room, require_chat_template
from stillhouse.generation.request import Answer, Failure, Request
from stillhouse.progress import note
from stillhouse.teachers.load import load_tokenizer

Lack = tuple[Literal["warning", "error"], str, str]
"""How bad it is that something is not here, what it is, and what to do."""

WITHOUT = "what the journal holds needs no vLLM; `local` and `api` (`vllm serve`) go without it"


def lacks(section: VllmEngine) -> list[Lack]:
    """What this machine lacks of what the section asks for. Imports neither vLLM nor Ray."""
    found: list[Lack] = []
    if importlib.util.find_spec("vllm") is None:
        fix = f"pip install 'stillhouse[vllm]'; {WITHOUT}"
        found.append(("error", "vLLM is not installed", fix))
    if section.executor == "ray" and importlib.util.find_spec("ray") is None:
        fix = "pip install 'stillhouse[vllm,ray]' on every machine, or executor: auto on one"
        found.append(("error", "Ray is not installed", fix))
    gpus = torch.cuda.device_count()
    if gpus == 0:
        fix = f"use a machine with one, or vLLM's build for CPUs; {WITHOUT}"
        found.append(("warning", "no GPU is here, and vLLM's usual build needs one", fix))
    elif section.executor != "ray" and section.gpus > gpus:
        text = f"{section.gpus} GPUs are asked for, and this machine has {gpus}"
        fix = "lower tensor_parallel or pipeline_parallel, or set executor: ray on a Ray cluster"
        found.append(("error", text, fix))
    return found


@dataclass
class VllmGenerator:
    """llm: a vllm.LLM. sampling: vllm.SamplingParams. window: tokens that it can read and write.

    Known parameters of a request are those of `local.Generator`. A sampled answer is drawn by a
    seed of its request's own.
    """

    llm: Any
    sampling: Callable[..., Any]
    tokenizer: Any
    window: int
    batch: int

    def answers(self, requests: Iterable[Request]) -> Iterator[tuple[Request, Outcome]]:
        """Each request with its answer, or with the reason why there is none. `requests` is read
        lazily, a batch at a time. Raises ModelError where vLLM fails."""
        requests = iter(requests)
        while ahead := list(itertools.islice(requests, self.batch)):
            ready: list[tuple[Request, list[int], int]] = []
            for request in ahead:
                found = prompt_and_room(self.tokenizer, request, self.window)
                if isinstance(found, Failure):
                    yield request, found
                else:
                    ready.append((request, *found))
            if ready:
                yield from self._written(ready)

    def _written(
        self, ready: list[tuple[Request, list[int], int]]
    ) -> Iterator[tuple[Request, Outcome]]:
        began = time.monotonic()
        try:
            outputs = self.llm.generate(
                [{"prompt_token_ids": prompt} for _, prompt, _ in ready],
                sampling_params=[self._sampled(request, most) for request, _, most in ready],
                use_tqdm=False,
            )
        # It raises errors of many kinds, a GPU's among them.
        except Exception as error:
            raise _failed("vLLM stopped", error) from error
        seconds = time.monotonic() - began
        for (request, prompt, _), output in zip(ready, outputs, strict=True):
            yield request, _outcome(output.outputs[0], len(prompt), seconds)

    def _sampled(self, request: Request, most: int) -> Any:
        parameters = request.parameters
        temperature = float(parameters.get("temperature", 0.0))
        return self.sampling(
            temperature=temperature,
            top_p=float(parameters.get("top_p", 1.0)),
            max_tokens=most,
            # The key tells samples of one prompt apart, and holds the recipe's seed.
            seed=int(request.key[:15], 16) if temperature > 0 else None,
            # 0: of the token that was written, and of no other.
            logprobs=0 if parameters.get("logprobs") else None,
        )


def _outcome(written: Any, prompt_tokens: int, seconds: float) -> Outcome:
    """seconds: of the whole batch, in which no answer has a time of its own."""
    if written.finish_reason not in ("stop", "length"):
        return Failure("server", f"vLLM ended the answer: {written.finish_reason}")
    logprobs = None
    if written.logprobs is not None:
        places = zip(written.token_ids, written.logprobs, strict=True)
        logprobs = [{"logprob": float(told[token].logprob)} for token, told in places]
    return Answer(
        text=written.text,
        finish_reason=written.finish_reason,
        prompt_tokens=prompt_tokens,
        completion_tokens=len(written.token_ids),
        cost=0.0,
        seconds=seconds,
        logprobs=logprobs or None,
    )


@contextmanager
def opened(
    section: VllmEngine, path: Path, *, seed: int, trust_remote_code: bool
) -> Iterator[VllmGenerator]:
    """The model in a folder, run by vLLM, which gives its memory back at the end.

    Raises ModelError: something is not installed, too few GPUs, or vLLM cannot load the model.
    """
    for level, text, fix in lacks(section):
        if level == "error":
            raise ModelError(text, where="teacher.vllm", fix=fix)
        note(text)
    tokenizer = load_tokenizer(path, trust_remote_code=trust_remote_code)
    require_chat_template(tokenizer, str(path))
    from vllm import LLM, SamplingParams

    try:
        llm = LLM(
            model=str(path),
            trust_remote_code=trust_remote_code,
            dtype=section.dtype,
            seed=seed,
            tensor_parallel_size=section.tensor_parallel,
            pipeline_parallel_size=section.pipeline_parallel,
            distributed_executor_backend=None if section.executor == "auto" else section.executor,
            max_model_len=section.context,
            gpu_memory_utilization=section.gpu_memory,
            **section.options,
        )
    except Exception as error:
        raise _failed(f"vLLM cannot load {path}", error) from error
    window = int(llm.llm_engine.model_config.max_model_len)
    generator = VllmGenerator(llm, SamplingParams, tokenizer, window, section.batch)
    try:
        yield generator
    finally:
        # The engine ends with the last reference to it, and training needs the memory.
        del llm
        generator.llm = None
        gc.collect()


def _failed(what: str, error: Exception) -> ModelError:
    said = str(error).strip().splitlines() or ["no reason given"]
    return ModelError(
        f"{what} ({type(error).__name__}: {said[-1]})",
        where="teacher.vllm",
        fix="lower context, gpu_memory or batch where memory is short; answers that arrived are "
        "in the journal",
    )

"""vLLM writes the text of a student in training: new weights before each window of steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch

from stillhouse.generation.generator import Generator
from stillhouse.generation.rollout_config import VllmRollouts, VllmServerRollouts
from stillhouse.generation.vllm_engine import (
    ROLLOUTS,
    VllmGenerator,
    engine_options,
    require_vllm,
    start_engine,
)
from stillhouse.generation.vllm_process import VllmProcess
from stillhouse.generation.vllm_server import VllmServer
from stillhouse.generation.weight_handover import (
    hand_over,
    require_same_weights,
    save_weights,
)
from stillhouse.launch import leads, world_size
from stillhouse.processes import wait_for_all
from stillhouse.teachers.model_source import AnyModel, source_of

OpenGenerator = Callable[[Any, frozenset[int]], AbstractContextManager[Generator]]
"""(the student, tokens that end an answer) → a generator with its weights as they are."""


@contextmanager
def vllm_rollouts(
    section: VllmRollouts, checkpoint: AnyModel, *, base: Path, seed: int
) -> Iterator[OpenGenerator]:
    """vLLM on this machine, for a training: started when the student first writes, asleep between
    windows where it runs on GPUs, closed at the end of the block.

    checkpoint: a folder for the weights; each process needs its own. Raises ModelError: something
    is not installed, too few GPUs, vLLM fails, or has other weights than the student.
    """
    require_vllm(section, base, where=ROLLOUTS)
    dtype = None if section.dtype == "auto" else getattr(torch, section.dtype)
    options, folder = engine_options(section, checkpoint, seed=seed), source_of(checkpoint).path
    # Prompts and answers are token ids.
    options |= {"skip_tokenizer_init": True, "enable_sleep_mode": torch.cuda.is_available()}
    # On a CPU, vLLM packs the head, and does not pack it again with new weights if it is tied.
    untied = not torch.cuda.is_available()
    if untied:
        options["hf_overrides"] = {"tie_word_embeddings": False}
    engine: VllmProcess | None = None

    def started(model: Any) -> VllmProcess:
        save_weights(model, folder, dtype, head_too=untied)
        own_gpu = world_size() > 1
        found = start_engine(section, options, base, where=ROLLOUTS, own_gpu=own_gpu)
        try:
            require_same_weights(found, model, tolerance=section.tolerance)
        except BaseException:
            found.close()
            raise
        return found

    @contextmanager
    def opened(model: Any, ends: frozenset[int]) -> Iterator[Generator]:
        nonlocal engine
        if engine is None:
            engine = started(model)
        else:
            hand_over(
                engine,
                model,
                folder,
                tolerance=section.tolerance,
                dtype=dtype,
                head_too=untied,
            )
        yield VllmGenerator(engine, section.batch, tuple(sorted(ends)), ROLLOUTS)
        engine.sleep()

    try:
        yield opened
    finally:
        if engine is not None:
            engine.close()


@contextmanager
def server_rollouts(section: VllmServerRollouts) -> Iterator[OpenGenerator]:
    """A vLLM server, for a training. Under torchrun, the main process hands the weights over, and
    all processes use the server. Raises ModelError as `vllm_rollouts`, EndpointError for a key."""
    server, folder = VllmServer(section), Path(section.weights).expanduser()

    @contextmanager
    def opened(model: Any, ends: frozenset[int]) -> Iterator[Generator]:
        if leads():
            hand_over(server, model, folder, tolerance=section.tolerance)
        wait_for_all()
        batch = 4 * section.concurrency
        yield VllmGenerator(server, batch, tuple(sorted(ends)), ROLLOUTS)

    yield opened

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
    claim_folder,
    hand_over,
    require_same_weights,
    save_weights,
)
from stillhouse.launch import leads, local_index, world_size
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
        gpu = local_index() if world_size() > 1 and torch.cuda.is_available() else None
        found = start_engine(section, options, base, where=ROLLOUTS, gpu=gpu)
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
def server_rollouts(section: VllmServerRollouts, *, base: Path) -> Iterator[OpenGenerator]:
    """A vLLM server, for a training. Under torchrun, the main process hands the weights over, and
    all processes use the server. base: where a relative `weights` starts. Raises ModelError as
    `vllm_rollouts`, EndpointError for a key, RunError as `claim_folder`."""
    server, folder = VllmServer(section), section.folder(base)
    if leads():
        claim_folder(folder)

    @contextmanager
    def opened(model: Any, ends: frozenset[int]) -> Iterator[Generator]:
        if leads():
            hand_over(server, model, folder, tolerance=section.tolerance)
        wait_for_all()
        batch = 4 * section.concurrency
        yield VllmGenerator(server, batch, tuple(sorted(ends)), ROLLOUTS)

    yield opened

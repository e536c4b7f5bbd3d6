"""Generates a student's text in vLLM during training, with new weights before each window of
steps."""

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
"""(the student, tokens that end an answer) → a generator with the student's current weights."""


@contextmanager
def vllm_rollouts(
    section: VllmRollouts, checkpoint: AnyModel, *, base: Path, seed: int
) -> Iterator[OpenGenerator]:
    """Use vLLM on this machine during training.

    It is started when the student first generates, sleeps between windows if it runs on GPUs, and
    is closed at the end of the block. checkpoint: a folder for the weights; each process needs a
    separate one. Raises ModelError if a package is not installed, there are too few GPUs, vLLM
    fails, or its weights differ from the student's.
    """
    require_vllm(section, base, where=ROLLOUTS)
    dtype = None if section.dtype == "auto" else getattr(torch, section.dtype)
    options, folder = engine_options(section, checkpoint, seed=seed), source_of(checkpoint).path
    # Prompts and answers are token ids.
    options |= {"skip_tokenizer_init": True, "enable_sleep_mode": torch.cuda.is_available()}
    # On a CPU, vLLM packs the head, but does not repack a tied head when weights are reloaded.
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
    """Use a vLLM server during training.

    Under torchrun, the main process transfers the weights, and all processes use the server. base:
    where a relative `weights` starts. Raises ModelError as `vllm_rollouts`, EndpointError if the
    key is missing, and RunError as `claim_folder`.
    """
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

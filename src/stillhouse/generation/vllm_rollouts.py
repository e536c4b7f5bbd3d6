"""Generates a student's text in vLLM during training, with new weights before each window of
steps."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
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
from stillhouse.generation.weight_handover import (
    claim_folder,
    hand_over,
    require_same_weights,
    save_weights,
)
from stillhouse.launch import leads, local_index, world_size
from stillhouse.processes import wait_for_all
from stillhouse.teachers.model_source import AnyModel, source_of
from stillhouse.teachers.signal_server import Post, SignalLink

COMMAND = "VLLM_SERVER_DEV_MODE=1 vllm serve STUDENT"
MOST_BYTES, MOST_BYTES_PER_TOKEN = 1 << 20, 1 << 10
"""Maximum size of a reply: a constant, plus an amount per token."""

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
    gpu = local_index() if world_size() > 1 and torch.cuda.is_available() else None
    engine: VllmProcess | None = None
    running = ExitStack()

    @contextmanager
    def opened(model: Any, ends: frozenset[int]) -> Iterator[Generator]:
        nonlocal engine
        how: dict[str, Any] = {"dtype": dtype, "head_too": untied}
        if engine is None:
            save_weights(model, folder, **how)
            started = start_engine(section, options, base, where=ROLLOUTS, gpu=gpu)
            engine = running.enter_context(closing(started))
            require_same_weights(engine, model, tolerance=section.tolerance)
        else:
            hand_over(engine, model, folder, tolerance=section.tolerance, **how)
        yield VllmGenerator(engine, section.batch, tuple(sorted(ends)), ROLLOUTS)
        engine.sleep()

    with running:
        yield opened


class VllmServer:
    """A `WeightEngine` on a server, which reads the weights from its disk.

    Raises EndpointError if the key's variable is not set.
    """

    window = 0

    def __init__(self, section: VllmServerRollouts) -> None:
        self.section = section
        self._link = SignalLink(
            section, missing="endpoint", rejected=f"start it with {COMMAND}", section=ROLLOUTS
        )

    def generate(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """See `vllm_worker.generate`. Up to `concurrency` requests are in flight at a time. Raises
        ModelError."""
        return self._link.each(rows, self._write)

    def load_weights(self, folder: Path) -> None:
        """Load the weights of a checkpoint that the server can read. Raises ModelError."""
        arguments = {"weights_path": str(folder)}
        self._call("collective_rpc", {"method": "reload_weights", "kwargs": arguments})
        self._call("reset_prefix_cache", {})  # it was computed with the old weights

    async def _write(self, post: Post, row: dict[str, Any]) -> dict[str, Any]:
        sampling = {name: value for name, value in row["sampling"].items() if value is not None}
        named = {"model": self.section.model, "prompt": row["prompt"], "return_token_ids": True}
        tokens = len(row["prompt"]) + row["sampling"]["max_tokens"]
        most = MOST_BYTES + MOST_BYTES_PER_TOKEN * tokens
        body = await post("completions", {**named, **sampling}, most)
        try:
            (choice,) = json.loads(body)["choices"]
            logprobs = choice["logprobs"] and choice["logprobs"]["token_logprobs"]
            return {
                "text": choice["text"],
                "ids": [int(token) for token in choice["token_ids"]],
                "stop": str(choice["finish_reason"]),
                "logprobs": logprobs and [float(one) for one in logprobs],
            }
        except (LookupError, TypeError, ValueError, RecursionError) as error:
            raise self._link.error(
                f"the server's answer has no token ids ({type(error).__name__}: {error})",
                "use vLLM 0.29 or newer, which supports return_token_ids in completions",
            ) from error

    def _call(self, endpoint: str, body: Mapping[str, Any]) -> None:
        async def call(post: Post, url: str) -> bytes:
            return await post(url, body, MOST_BYTES)

        self._link.each([f"{self._link.root}/{endpoint}"], call)


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

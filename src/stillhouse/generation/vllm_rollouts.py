"""Generates a student's text in vLLM during training, with new weights before each window of
steps, and verifies that they arrived.

Shapes: R = 1 row, L tokens, V vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

from stillhouse.disk_errors import disk_errors
from stillhouse.errors import ModelError, RunError
from stillhouse.generation.generator import Generator
from stillhouse.generation.rollout_config import VllmRollouts, VllmServerRollouts
from stillhouse.generation.vllm_engine import (
    ROLLOUTS,
    VllmGenerator,
    Writer,
    engine_options,
    require_vllm,
    start_engine,
    vllm_errors,
)
from stillhouse.generation.vllm_process import VllmProcess
from stillhouse.launch import leads, local_index, world_size
from stillhouse.processes import wait_for_all
from stillhouse.teachers.model_source import AnyModel, source_of
from stillhouse.teachers.signal_server import Post, SignalLink

COMMAND = "VLLM_SERVER_DEV_MODE=1 vllm serve STUDENT"
MOST_BYTES, MOST_BYTES_PER_TOKEN = 1 << 20, 1 << 10
"""Maximum size of a reply: a constant, plus an amount per token."""
PROMPT_TOKENS, ROW_TOKENS = 8, 32
"""Lengths of the prompt and the row that are compared."""
HEAD = "lm_head.weight"
MARK = "written_by_stillhouse"
"""A file that marks a folder in which weights for a server may be overwritten."""

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

        async def load(post: Post, root: str) -> None:
            body = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
            await post(f"{root}/collective_rpc", body, MOST_BYTES)
            # It was computed with the old weights.
            await post(f"{root}/reset_prefix_cache", {}, MOST_BYTES)

        self._link.each([self._link.root], load)

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


# --- weights -----------------------------------------------------------------------------------


class WeightEngine(Writer, Protocol):
    """An engine whose weights can be replaced."""

    def load_weights(self, folder: Path) -> None: ...


def require_no_other_model(folder: Path) -> None:
    """Raise RunError if the folder contains a model that was not written for a server."""
    model = (folder / "config.json").exists() or any(folder.glob("*.safetensors*"))
    if model and not (folder / MARK).exists():
        raise RunError(
            "this folder contains a model, which the transferred weights would overwrite",
            where=folder,
            fix=f"set {ROLLOUTS}.weights to a new folder that the server can also read",
        )


def claim_folder(folder: Path) -> None:
    """Mark a folder as one for weights, before any are written to it.

    Raises RunError as `require_no_other_model`, or if it cannot be written.
    """
    require_no_other_model(folder)
    with disk_errors(folder, elsewhere="use a different folder for the weights"):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / MARK).touch()


@torch.no_grad()
def save_weights(
    model: Any, folder: Path, dtype: torch.dtype | None = None, *, head_too: bool = False
) -> None:
    """Write a model as a checkpoint, replacing the previous one.

    dtype: dtype to write; None: unchanged. head_too: also write a head that is tied to the
    embeddings, for an engine that keeps both. Raises RunError if the disk is full, and ModelError
    for a sharded model.
    """
    state = model.state_dict()
    if any(isinstance(tensor, DTensor) for tensor in state.values()):
        raise ModelError(
            "the weights of a sharded student cannot be transferred to vLLM",
            where=ROLLOUTS,
            fix="use generator.kind: local, or train.shard: none or teacher",
        )
    if dtype is not None:
        # Tied weights stay a single tensor, which is written once.
        cast = {
            tensor.data_ptr(): tensor.to(dtype)
            for tensor in state.values()
            if tensor.is_floating_point()
        }
        state = {name: cast.get(tensor.data_ptr(), tensor) for name, tensor in state.items()}
    with disk_errors(folder, elsewhere="use a folder on a larger disk for the weights"):
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob("*.safetensors*"):
            old.unlink()
        # Write one file, because vLLM reads every *.safetensors in a folder without an index.
        model.save_pretrained(folder, state_dict=state, max_shard_size="100TB")
        if head_too and model.config.get_text_config().tie_word_embeddings:
            weight_VD = model.get_output_embeddings().weight
            tied = {HEAD: weight_VD.detach().to(dtype or weight_VD.dtype).contiguous()}
            save_file(tied, folder / "head.safetensors", metadata={"format": "pt"})


def hand_over(
    engine: WeightEngine,
    model: Any,
    folder: Path,
    *,
    tolerance: float,
    dtype: torch.dtype | None = None,
    head_too: bool = False,
) -> float:
    """Transfer the model's weights to the engine, through a checkpoint in `folder`, and compare.

    dtype, head_too: see `save_weights`. Returns the difference that `require_same_weights` finds.
    Raises ModelError as it does, or if the engine cannot load the weights.
    """
    save_weights(model, folder, dtype, head_too=head_too)
    with vllm_errors("vLLM cannot load the student's weights", ROLLOUTS):
        engine.load_weights(folder)
    return require_same_weights(engine, model, tolerance=tolerance)


def require_same_weights(engine: Writer, model: Any, *, tolerance: float) -> float:
    """Compare the engine's and the model's log-probabilities of one row.

    The engine generates the row at temperature 1. Returns the mean absolute difference in
    nats/token; raises ModelError if it is above `tolerance` or not a number.
    """
    chance = torch.Generator().manual_seed(0)
    vocabulary = int(model.config.get_text_config().vocab_size)
    prompt = torch.randint(vocabulary, (PROMPT_TOKENS,), generator=chance).tolist()
    sampling = {"temperature": 1.0, "seed": 0, "max_tokens": ROW_TOKENS, "logprobs": 0}
    with vllm_errors("vLLM stopped", ROLLOUTS):
        (row,) = engine.generate([{"prompt": prompt, "sampling": {**sampling, "ignore_eos": True}}])
    theirs_L = torch.tensor(row["logprobs"] or [], dtype=torch.float64)
    ours_L = log_probabilities(model, prompt, row["ids"])
    if not len(theirs_L) or theirs_L.shape != ours_L.shape:
        raise ModelError(
            f"the engine returns {len(theirs_L)} log-probabilities for {len(ours_L)} tokens",
            where=ROLLOUTS,
            fix="use a vLLM that returns the log-probabilities of its tokens",
        )
    apart = float((theirs_L - ours_L).abs().mean())
    if not apart <= tolerance:
        raise ModelError(
            "after the weights were transferred, the engine's log-probabilities differ from the "
            f"student's by {apart:.3g} nats/token, but only {tolerance:g} are allowed: it has "
            "different weights, or computes in a different precision",
            where=ROLLOUTS,
            fix="set dtype: float32, or raise tolerance if the engine's precision is the cause; "
            "otherwise, start the engine with this student",
        )
    return apart


@torch.no_grad()
def log_probabilities(model: Any, prompt: list[int], ids: list[int]) -> torch.Tensor:
    """The model's log-probability of each token in `ids` after `prompt`, at temperature 1: [L],
    float64."""
    ids_RL = torch.tensor([[*prompt, *ids]], device=model.device)
    logits_LV = model(input_ids=ids_RL, use_cache=False).logits[0, len(prompt) - 1 : -1]
    log_p_LV = logits_LV.double().log_softmax(-1)
    return log_p_LV.gather(1, ids_RL[0, len(prompt) :, None])[:, 0].cpu()

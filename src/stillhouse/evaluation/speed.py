"""Measure the prefill and decoding speed of several models in one run, and each model's memory.

`python -m stillhouse.evaluation.speed PATH DTYPE DEVICE [trust_remote_code]` prints a model's peak
memory in bytes. It runs in a separate process because a process's peak never decreases.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stillhouse.errors import ModelError, process_failure
from stillhouse.generation.kv_cache import caches_of
from stillhouse.hardware import peak_memory_bytes, synchronize
from stillhouse.teachers.load_model import load_model
from stillhouse.teachers.model_source import AnyModel, ModelSource, source_of

PROMPT_TOKENS = 128
DECODE_TOKENS = 16
ROUNDS = 5
Clock = Callable[[], float]


@dataclass(frozen=True)
class Rates:
    """Tokens/s for one sequence: reading the prompt, and decoding one token after another."""

    prefill_tokens_per_s: float
    decode_tokens_per_s: float


def measure_rates(
    models: Mapping[str, nn.Module],
    vocabulary: int,
    *,
    seed: int = 0,
    advance: Callable[[int], object] = lambda rounds: None,
    clock: Clock = time.perf_counter,
) -> dict[str, Rates]:
    """Time all models on the same prompt, alternating between them, and return each model's median.

    Each model runs once per round. The order shifts by one from round to round, so that slowdowns
    of the machine affect all models equally. A first round, for caches and compilation, is not
    counted. All models must be in memory, with the same dtype and on the same kind of device.

    advance: called after each round.
    clock: returns seconds.
    """
    generator = torch.Generator().manual_seed(seed)
    prompt_RL = torch.randint(0, vocabulary, (1, PROMPT_TOKENS), generator=generator)
    seconds: dict[str, list[tuple[float, float]]] = {role: [] for role in models}
    roles = list(models)
    for turn in range(ROUNDS + 1):
        shift = turn % len(roles)
        for role in roles[shift:] + roles[:shift]:
            timing = prefill_and_decode(models[role], prompt_RL, DECODE_TOKENS, clock)
            if turn > 0:
                seconds[role].append(timing)
        advance(1)
    rates = {}
    for role, timings in seconds.items():
        prefill, decode = (statistics.median(part) for part in zip(*timings, strict=True))
        rates[role] = Rates(PROMPT_TOKENS / prefill, DECODE_TOKENS / decode)
    return rates


@torch.inference_mode()
def prefill_and_decode(
    model: nn.Module, prompt_RL: Tensor, decode_tokens: int, clock: Clock = time.perf_counter
) -> tuple[float, float]:
    """Read the prompt, then decode `decode_tokens` tokens greedily with the KV cache. Return the
    seconds of both parts.

    Prefill only computes the logits of the last position, like a server. Every decoding step is a
    forward pass with one token per sequence.
    """
    device = next(model.parameters()).device
    prompt_RL = prompt_RL.to(device)
    step: Callable[..., Any] = model.eval()
    synchronize(device)
    started = clock()
    output = step(input_ids=prompt_RL, use_cache=True, logits_to_keep=1)
    synchronize(device)
    prefilled = clock()
    for _ in range(decode_tokens):
        next_R1 = output.logits[:, -1:].argmax(-1)
        output = step(input_ids=next_R1, use_cache=True, **caches_of(output))
    synchronize(device)
    return prefilled - started, clock() - prefilled


def measure_peak_memory(
    model: AnyModel,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    *,
    instead: str = "set evaluate.speed: false",
) -> int:
    """Peak memory in bytes of loading the model in `dtype` and using it, in a separate process.

    On a CPU, this is the resident memory of the whole process: Python, libraries (about 300 MB),
    the model, and the checkpoint's pages while they are mapped. Pages that are never read, such as
    the embeddings of unused tokens, take none. On a GPU, it is the device memory that torch
    allocated.

    instead: what an error proposes, besides freeing memory.

    Raises:
        ModelError: the process failed.
    """
    source = source_of(model)
    path, name = source.path, str(dtype).removeprefix("torch.")
    command = [sys.executable, "-m", "stillhouse.evaluation.speed", str(path), name, str(device)]
    command += ["trust_remote_code"] if source.trusted else []
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    if finished.returncode != 0:
        why = process_failure(finished.returncode, finished.stderr)
        raise ModelError(
            f"the process that measures the model's memory failed: {why}",
            where=path,
            fix=f"free some memory, or {instead}",
        )
    return int(finished.stdout.splitlines()[-1])


def main(path: str, dtype: str, device: str, *options: str) -> None:
    source = ModelSource(Path(path), trusted="trust_remote_code" in options)
    model = load_model(source, dtype=getattr(torch, dtype)).to(device)
    prompt_RL = torch.zeros(1, PROMPT_TOKENS, dtype=torch.long)
    prefill_and_decode(model, prompt_RL, DECODE_TOKENS)
    on_gpu = torch.device(device).type == "cuda"
    peak = torch.cuda.max_memory_allocated() if on_gpu else peak_memory_bytes()
    sys.stdout.write(f"{peak}\n")


if __name__ == "__main__":
    main(*sys.argv[1:])

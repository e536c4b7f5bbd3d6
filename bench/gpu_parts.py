"""The measurements of bench/gpu.py, each run in this process: `python -m bench.gpu_parts PART`.

Every figure is printed as a line of JSON as soon as it is known.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import psutil
import torch
from tests.planning.shapes import QWEN3_1_7B, QWEN3_4B, QWEN3_8B, TIED, sizes
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, Qwen3Config

from bench.contenders import CONTENDERS, installed, make_problem, matmul_floor, quiet, run
from bench.losses import measure_memory, measure_sparse, rounds_of
from stillhouse import account
from stillhouse.data.batches import Batch
from stillhouse.hardware import free_memory, matmul_rate, peak_memory_bytes
from stillhouse.objectives.objective_config import ObjectiveRecipe
from stillhouse.planning.step_memory import Memory, training_memory
from stillhouse.planning.training_step import training_step
from stillhouse.students.student import Student
from stillhouse.teachers.teacher import Teacher
from stillhouse.training.train import train
from stillhouse.training.train_config import TrainRecipe

ROOT = Path(__file__).parents[1]
LIGER = "liger 1024"
FLOOR_ROWS = 2048
SEED = 0
TEST_PROCESSES = 6
WARM_STEPS = 2
"""First steps, which compile kernels and fill the allocator's cache, and are not timed."""
SMALLER: tuple[dict[str, str], ...] = (
    {},
    {"optimizer": "adamw_8bit"},
    {"optimizer": "adamw_8bit", "weights": "bfloat16"},
)
"""Settings for training the student; the first that fits is measured."""
MICRO_BATCHES = 4, 2, 1
"""Windows per micro-batch; the first number that fits is used. With small micro-batches, the GPU
waits for Python, which launches a few thousand kernels for each of them."""


PAIRS: dict[str, tuple[PreTrainedConfig, PreTrainedConfig]] = {
    "1.7B:1B": (
        QWEN3_1_7B,
        Qwen3Config(**sizes(2048, 3072, 20, 16, 8, 151936), **TIED),
    ),
    "8B:4B": (QWEN3_8B, QWEN3_4B),
    "tiny": (
        LlamaConfig(**sizes(32, 64, 2, 4, 2, 256)),
        LlamaConfig(**sizes(32, 48, 2, 4, 2, 256)),
    ),
}
"""Configurations of teacher and student: Qwen3 models of these sizes, 1B with fewer layers and a
smaller FFN than 1.7B; `tiny` is for trying the script."""


def add_sizes(parser: argparse.ArgumentParser) -> None:
    """Add the options for all sizes."""
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--rows", type=int, default=8192, help="rows of the loss")
    parser.add_argument("--vocab", type=int, nargs="*", default=[128_000, 256_000])
    parser.add_argument("--width", type=int, nargs="*", default=[2048, 4096, 8192])
    parser.add_argument("--rounds", type=int, default=3, help="timed runs of each loss")
    parser.add_argument("--pairs", nargs="*", default=["1.7B:1B", "8B:4B"], choices=PAIRS)
    parser.add_argument("--context", type=int, default=4096, help="tokens per window")
    parser.add_argument("--steps", type=int, default=5, help="optimizer steps per training")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=MEASURES)
    add_sizes(parser)
    options = parser.parse_args()
    with quiet():
        MEASURES[options.part](options)


def say(**figures: Any) -> None:
    print(json.dumps(figures), flush=True)


# --- tests -----------------------------------------------------------------------------------


def run_tests(options: argparse.Namespace) -> None:
    """Run the tests marked `cuda`, from the files that contain the mark."""
    files = [
        str(path)
        for path in sorted((ROOT / "tests").rglob("test_*.py"))
        if "mark.cuda" in path.read_text("utf-8")
    ]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-m",
            "cuda and not slow",
            "-p",
            "no:cacheprovider",
        ]
        if importlib.util.find_spec("xdist"):  # most of the time is spent compiling kernels
            command += ["-n", str(min(TEST_PROCESSES, os.cpu_count() or 1))]
        done = subprocess.run(
            [*command, f"--junitxml={report}", *files],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
            check=False,
        )
        counts = next(ElementTree.parse(report).iter("testsuite")).attrib
    failures = int(counts["failures"]) + int(counts["errors"])
    skipped = int(counts["skipped"])
    say(failures=failures, skipped=skipped, passed=int(counts["tests"]) - failures - skipped)
    if failures:
        say(output=done.stdout[-2000:])


# --- the loss --------------------------------------------------------------------------------


def measure_losses(options: argparse.Namespace) -> None:
    """Measure forward KL with dense and sparse signals for every shape, smallest first."""
    rate = matmul_rate(torch.bfloat16, options.device)
    say(product_rate=rate)
    shapes = sorted(
        ((vocab, width) for vocab in options.vocab for width in options.width),
        key=lambda shape: shape[0] * shape[1],
    )
    for vocab, width in shapes:
        say(**{f"V={vocab}, D={width}": one_loss(options, vocab, width, rate)})


def one_loss(options: argparse.Namespace, vocab: int, width: int, rate: float) -> dict[str, Any]:
    shape: dict[str, Any] = {"masked": 0.0, "beta": 0.0, "device": options.device}
    problem = make_problem(options.rows, vocab, width, dtype=torch.bfloat16, seed=SEED, **shape)
    names = [name for name in ("stillhouse", LIGER) if installed(name)]
    contenders: dict[str, Callable[[], object]] = {
        name: partial(run, CONTENDERS[name], problem) for name in names
    }
    values = {name: float(run(CONTENDERS[name], problem)) for name in names}
    floor_rows = min(FLOOR_ROWS, options.rows)
    contenders["floor"] = partial(matmul_floor, problem, floor_rows)
    rounds_of(contenders, 1, options.device)
    times = rounds_of(contenders, options.rounds, options.device)
    best = {name: min(seconds) for name, seconds in times.items()}
    found: dict[str, Any] = {
        "seconds": times,
        "losses": values,
        "roofline": 8 * options.rows * vocab * width / best["stillhouse"] / rate,
        "floor": best["floor"] / best["stillhouse"],
    }
    del problem, contenders
    free_memory()
    settings = argparse.Namespace(
        **shape, rows=options.rows, vocab=vocab, width=width, dtype="bfloat16",
        rounds=options.rounds, contender="stillhouse",
    )  # fmt: skip
    found["memory"] = measure_memory(settings)["bytes"]
    if LIGER in best:
        settings.contender = LIGER
        memory = measure_memory(settings)["bytes"]
        ours = best["stillhouse"]
        found["liger"] = {"time": ours / best[LIGER], "memory": found["memory"] / max(memory, 1)}
    seconds = measure_sparse(settings)["seconds"]
    found["sparse"] = min(seconds["sparse"]) / min(seconds["dense"])
    free_memory()
    return found


# --- training steps --------------------------------------------------------------------------


class RandomText:
    """Windows of random tokens, each a separate document."""

    def __init__(self, windows: int, context: int, vocabulary: int) -> None:
        g = torch.Generator().manual_seed(SEED)
        self.ids_WL = torch.randint(0, vocabulary, (windows, context), generator=g)
        self.context = context
        self.supervised_tokens = windows * (context - 1)

    def __len__(self) -> int:
        return len(self.ids_WL)

    def __getitem__(self, index: int) -> Batch:
        ids_L = self.ids_WL[index]
        positions_L = torch.arange(self.context)
        return {"input_ids": ids_L, "labels": ids_L.clone(), "position_ids": positions_L}


def random_weights(config: Any, dtype: torch.dtype, device: str) -> Any:
    """Make a model with random weights directly on the device."""
    torch.manual_seed(SEED)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def settings_for(changes: Mapping[str, str], micro_batch: int, steps: int) -> TrainRecipe:
    return TrainRecipe.model_validate(
        {
            "batch_size": 2 * micro_batch,
            "micro_batch_size": micro_batch,
            "max_steps": steps,
            "epochs": float(steps),
            "gradient_checkpointing": True,
            "precision": "bfloat16",
            **changes,
        }
    )


def plan_for(options: argparse.Namespace, settings: TrainRecipe) -> Memory:
    teacher, student = map(copy.deepcopy, PAIRS[options.pairs[0]])
    weights = getattr(torch, settings.weights)
    step = training_step(
        student,
        [teacher],
        windows=settings.micro_batch_size or 1,
        context=options.context,
        accumulates=True,
        compute=torch.bfloat16,
        weights=weights,
        gathered=weights,
        device=options.device,
        checkpointing=True,
        optimizer=settings.optimizer,
    )
    return training_memory(step, "none", over=1, processes=1)


def available(device: str) -> int:
    if device == "cuda":
        return int(torch.cuda.mem_get_info()[0])
    return int(psutil.virtual_memory().available)


def train_some(options: argparse.Namespace) -> None:
    """Train a pair for some steps; print throughput and peak memory."""
    teacher, student = map(copy.deepcopy, PAIRS[options.pairs[0]])
    for changes, micro_batch in itertools.product(SMALLER, MICRO_BATCHES):
        settings = settings_for(changes, micro_batch, options.steps)
        plan = plan_for(options, settings)
        if plan.fits(available(options.device)):
            break
    planned = plan.total - plan.parts["context"]
    say(changes=changes, micro_batch=micro_batch, planned=planned)
    say(phase=plan.phase, parts=dict(plan.parts))
    before = peak_memory_bytes()
    if options.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    models = [
        random_weights(student, getattr(torch, settings.weights), options.device),
        random_weights(teacher, torch.bfloat16, options.device),
    ]
    counts = [account.count_parameters(each).active for each in models]
    text = RandomText(4 * micro_batch, options.context, student.vocab_size)
    result = train(
        Student(models[0]), Teacher.from_model(models[1]), text, ObjectiveRecipe(), settings
    )
    if options.device == "cuda":
        say(peak=torch.cuda.max_memory_allocated(), reserved=torch.cuda.max_memory_reserved())
    else:
        say(peak=peak_memory_bytes() - before)
    speeds = [row["tokens_per_s"] for row in result.metrics if "loss" in row]
    speed = statistics.median(speeds[WARM_STEPS:] or speeds)
    speed *= options.context / (options.context - 1)  # tokens_per_s counts supervised tokens
    rate = matmul_rate(torch.bfloat16, options.device)
    flops = 6 * counts[0] + 2 * counts[1]
    say(
        tokens_per_s=speed,
        student_parameters=counts[0],
        teacher_parameters=counts[1],
        product_rate=rate,
        utilization=speed * flops / rate,
    )


def find_memory(options: argparse.Namespace) -> None:
    """Train in this process, keep it alive, and start a second process that needs the GPU."""
    train_some(options)
    free_memory()
    command = [sys.executable, "-m", "bench.gpu_parts", "free", "--device", options.device]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    print(done.stdout.splitlines()[-1], flush=True)


def say_free(options: argparse.Namespace) -> None:
    """Print the share of the device's memory that this process can use."""
    if options.device == "cuda":
        free, total = torch.cuda.mem_get_info()
        torch.empty(int(0.9 * free), dtype=torch.uint8, device="cuda")
    else:
        memory = psutil.virtual_memory()
        free, total = memory.available, memory.total
    say(free=free / total)


MEASURES: dict[str, Callable[[argparse.Namespace], None]] = {
    "tests": run_tests,
    "loss": measure_losses,
    "step": train_some,
    "after": find_memory,
    "free": say_free,
}

if __name__ == "__main__":
    main()

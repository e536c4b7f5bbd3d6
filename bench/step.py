"""Throughput of a distillation step, relative to the machine's matrix multiplication rate.

    make bench NAME=step

A step is the teacher's forward pass, the student's forward and backward passes, and the optimizer,
with the models and batch size of recipes/pruned.yaml, as in the trainer. FLOPs are 6·P_s + 2·P_t
per token, where embeddings count once, as the head. The matrix multiplication rate is measured in
the same process before and after the steps. Each round runs `--steps` optimizer steps of
distillation, of plain fine-tuning, and of distillation from a signal store.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch

from bench.common import Bar, write_results
from stillhouse import account
from stillhouse.config.load_recipe import load_language_model_recipe
from stillhouse.data.build_data import build
from stillhouse.data.windows import open_windows
from stillhouse.hardware import (
    choose_precision,
    default_device,
    matmul_rate,
    peak_memory_bytes,
    tune_allocator,
)
from stillhouse.language_model.job import find_models
from stillhouse.language_model.recipe import Recipe
from stillhouse.objectives.objective_config import LogitsTerm, ObjectiveRecipe
from stillhouse.signals.encodings import Threshold
from stillhouse.signals.manifest import Settings
from stillhouse.signals.store import open_store
from stillhouse.students.build_student import build_student
from stillhouse.students.student import Student
from stillhouse.students.student_config import PrunedStudent, RandomStudent
from stillhouse.teachers.load_model import load_tokenizer
from stillhouse.teachers.local_teacher import load_teacher
from stillhouse.teachers.record_store import record
from stillhouse.teachers.stored_teacher import StoredTeacher
from stillhouse.teachers.teacher import Teacher
from stillhouse.training.checkpoints import read_metrics
from stillhouse.training.train import train

RECIPE = Path(__file__).parents[1] / "recipes" / "pruned.yaml"
DISTILLATION = ObjectiveRecipe()
KINDS = ("distillation", "fine_tuning", "cached")
STORED_TAU = 0.02
"""About 36 bytes/token."""
FINE_TUNING = ObjectiveRecipe(terms=[LogitsTerm(divergence="cross_entropy")])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE")
    options = parser.parse_args()
    tune_allocator()
    recipe = load_language_model_recipe(RECIPE, options.set)
    device = default_device()
    precision = choose_precision(recipe.train.precision, device)
    with tempfile.TemporaryDirectory() as name:
        job = Setting(recipe, Path(name))
        rounds = [job.round(n, options.steps, precision.dtype) for n in range(options.rounds)]
    fractions = [r["fraction"] for r in rounds]
    bars = [
        Bar(
            f"distillation step / {str(precision.dtype).removeprefix('torch.')} product rate "
            "(median)",
            statistics.median(fractions),
            ">=",
            0.60,
        ),
        Bar(
            "epoch from a store against a live one, over its bound 1 + P_t/3P_s (median)",
            statistics.median(r["cached_over_live"] for r in rounds) / bound(job),
            ">=",
            0.9,
        ),
    ]
    figures = {
        "student_parameters": job.student,
        "teacher_parameters": job.teacher,
        "precision": precision.reason,
        "batch_windows": recipe.train.batch_size,
        "context": recipe.data.context,
        "peak_memory_bytes": peak_memory_bytes(),
        "distillation_over_fine_tuning": statistics.median(r["ratio"] for r in rounds),
        "its_bound_1_plus_Pt_over_3_Ps": bound(job),
        "rounds": rounds,
    }
    write_results("step", figures, bars)


def bound(setting: Setting) -> float:
    return 1 + setting.teacher / (3 * setting.student)


class Setting:
    """The recipe's models at full size. The student's weights do not affect its speed."""

    def __init__(self, recipe: Recipe, folder: Path) -> None:
        self.recipe = recipe
        self.folder = folder
        job = find_models(recipe, RECIPE.parent)
        self.source = job.teacher
        tokenizer = load_tokenizer(job.teacher.path)
        build(recipe.data, tokenizer, seed=0, base=RECIPE.parent, out=folder / "data")
        self.windows = open_windows(folder / "data" / "train")
        self.heldout = open_windows(folder / "data" / "heldout")
        assert isinstance(recipe.student, PrunedStudent)
        assert recipe.student.ffn_size is not None
        section = RandomStudent(
            start="random", overrides={"intermediate_size": recipe.student.ffn_size}
        )
        summary = build_student(
            section,
            teacher=job.teacher,
            windows=self.windows,
            seed=0,
            base=RECIPE.parent,
            out=folder / "student",
        )
        self.student = int(summary["parameters"]["active"])
        device = default_device()
        dtype = choose_precision(recipe.train.precision, device).dtype
        teacher = load_teacher(job.teacher, dtype=dtype)
        teacher.place(device, self.windows.context)
        self.teacher = account.count_parameters(teacher.model).active
        settings = Settings(Threshold(STORED_TAU), job.vocabulary, identity={})
        record(teacher, [self.windows], settings, folder / "store")
        self.store = open_store(folder / "store")

    def round(self, number: int, steps: int, dtype: torch.dtype) -> dict[str, Any]:
        before = matmul_rate(dtype, default_device())
        turn = number % len(KINDS)
        order = KINDS[turn:] + KINDS[:turn]
        speed = {kind: self.tokens_per_second(kind, number, steps) for kind in order}
        after = matmul_rate(dtype, default_device())
        rate = statistics.fmean([before, after])
        flops = 6 * self.student + 2 * self.teacher
        return {
            "tokens_per_s": speed["distillation"],
            "fine_tuning_tokens_per_s": speed["fine_tuning"],
            "ratio": speed["fine_tuning"] / speed["distillation"],
            "cached_over_live": speed["cached"] / speed["distillation"],
            "matmul_flops_per_s": rate,
            "fraction": speed["distillation"] * flops / rate,
        }

    def tokens_per_second(self, kind: str, number: int, steps: int) -> float:
        """Median over all steps except the first."""
        out = self.folder / f"{kind}-{number}"
        section = self.recipe.train.model_copy(
            update={"max_steps": steps, "checkpoint_every": steps + 1, "evaluate_every": None}
        )
        teacher: Teacher | None = None
        if kind == "distillation":
            dtype = choose_precision(section.precision, default_device()).dtype
            teacher = load_teacher(self.source, dtype=dtype)
        elif kind == "cached":
            teacher = StoredTeacher(self.store)
        train(
            Student.load(self.folder / "student"),
            teacher,
            self.windows,
            FINE_TUNING if kind == "fine_tuning" else DISTILLATION,
            section,
            heldout=self.heldout,
            folder=out,
        )
        rows = [r["tokens_per_s"] for r in read_metrics(out / "metrics.jsonl") if "loss" in r]
        # Metrics count supervised tokens, but all tokens of a window are computed.
        all_tokens = self.windows.context * len(self.windows) / self.windows.supervised_tokens
        return statistics.median(rows[1:]) * all_tokens


if __name__ == "__main__":
    main()

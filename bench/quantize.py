"""The cost of rounding a student to int4, the KL that QAT recovers, and the exports.

    make bench NAME=quantize

The student of recipes/pruned.yaml is rounded to int4 in groups of 32, including its embeddings. Its
KL to the teacher on the recipe's held-out tokens is measured before and after rounding, and after
quantization-aware distillation on 30,000 tokens. `--control` adds the same student trained on the
same tokens without rounding and then rounded, which shows the effect of the tokens alone. Finally,
the exports are timed, including the replay, and compared with their checkpoint.
"""

from __future__ import annotations

import argparse
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import stillhouse
from bench.common import Bar, write_results
from stillhouse.commands import prepare_data
from stillhouse.data.windows import Windows
from stillhouse.evaluation.evaluate import evaluate
from stillhouse.evaluation.evaluate_config import EvaluateRecipe
from stillhouse.export.gate import Gate
from stillhouse.export.gguf_export import export_gguf
from stillhouse.hardware import choose_precision, default_device
from stillhouse.language_model.job import Job
from stillhouse.quantize.quantize import qat_section, quantize, train_quantized
from stillhouse.quantize.quantize_config import QatRecipe, QuantizeRecipe
from stillhouse.students.student import Student
from stillhouse.teachers.local_teacher import load_teacher
from stillhouse.teachers.teacher import Teacher
from stillhouse.training.train import MODEL, train

RECIPE = Path(__file__).parents[1] / "recipes" / "pruned.yaml"
QAT_TOKENS = 30_000
FORMATS = ("f16", "q8_0")


@dataclass(frozen=True)
class Bench:
    """Shared state of all parts. section: quantization settings."""

    job: Job
    windows: Windows
    heldout: Windows
    student: Path
    section: QuantizeRecipe
    folder: Path

    def load_teacher(self) -> Teacher:
        precision = choose_precision(self.job.recipe.train.precision, default_device())
        return load_teacher(self.job.teacher, dtype=precision.dtype)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--student", type=Path, help="a trained student; by default, recipes/pruned.yaml is run"
    )
    parser.add_argument(
        "--learning-rate", type=float, default=QatRecipe.model_fields["learning_rate"].default
    )
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0], help="of quantization-aware training"
    )
    parser.add_argument("--control", action="store_true")
    parser.add_argument("--folder", type=Path, default=Path("runs/quantize"))
    options = parser.parse_args()
    qat = QatRecipe(tokens=QAT_TOKENS, learning_rate=options.learning_rate)
    section = QuantizeRecipe(kind="int4", group_size=32, qat=qat)
    folder = options.folder
    job, windows, heldout = prepare_data(RECIPE, [f"folder={folder / 'run'}"])
    student = options.student or trained_student(folder)
    bench = Bench(job, windows, heldout, student, section, folder)
    for name in ("rounded", "qat", "control", "exports"):
        shutil.rmtree(folder / name, ignore_errors=True)
    figures = rounding(bench, options.seeds, options.control)
    figures["exports"] = exports(bench)
    kl = figures["kl_to_teacher"]
    added = {role: kl[role] - kl["student"] for role in kl if role not in ("teacher", "student")}
    figures["added_kl"] = added
    won = [1 - added[trained_role(seed)] / added["quantized"] for seed in options.seeds]
    figures["won_back"] = won
    bars = [
        Bar(
            "share of int4's added KL to the teacher that 30,000 rounded tokens win back",
            min(won),
            ">=",
            0.5,
        )
    ]
    for kind in FORMATS:
        seconds = figures["exports"][kind]["seconds"]
        bars.append(Bar(f"export of {kind}, replay included, s", seconds, "<=", 60))
    write_results("quantize", figures, bars, options.seeds)


def trained_role(seed: int) -> str:
    return f"quantized_trained_{seed}"


def trained_student(folder: Path) -> Path:
    result = stillhouse.run(RECIPE, overrides=[f"folder={folder / 'run'}"])
    assert result is not None
    return next(stage.path for stage in result.stages if stage.name == "train") / MODEL


def rounding(bench: Bench, seeds: list[int], with_control: bool) -> dict[str, Any]:
    job, folder = bench.job, bench.folder
    common: dict[str, Any] = {"vocabulary": job.vocabulary, "seed": job.recipe.seed}
    ways = {"section": bench.section, "heldout": bench.heldout, **common}
    ways["windows"] = bench.windows
    rounded = quantize(bench.student, folder / "rounded", **ways)
    print(f"rounded: {rounded.kl:.4f} nats/token to its own full precision", flush=True)
    trained = {
        seed: train_quantized(
            Student.load(bench.student),
            bench.load_teacher(),
            bench.windows,
            job.recipe.objective,
            job.recipe.train,
            quantized=folder / "rounded",
            section=bench.section,
            heldout=bench.heldout,
            folder=folder / "qat" / str(seed),
            seed=seed,
        )
        for seed in seeds
    }
    paths = {
        "teacher": job.teacher.path,
        "student": bench.student,
        "quantized": folder / "rounded" / MODEL,
        **{trained_role(seed): folder / "qat" / str(seed) / MODEL for seed in seeds},
    }
    if with_control:
        paths |= control(bench, ways)
    found = evaluate(
        paths,
        section=EvaluateRecipe(speed=False),
        windows=bench.heldout,
        precision=choose_precision("auto", default_device()),
        export_dtype=torch.bfloat16,
        **common,
    )
    for model in found.models:
        print(f"{model.role}: {model.fidelity.kl:.4f} nats/token to the teacher", flush=True)
    return {
        "kl_to_teacher": {model.role: model.fidelity.kl for model in found.models},
        "top1_agreement": {model.role: model.fidelity.top1_agreement for model in found.models},
        "kl_to_own_full_precision": rounded.kl,
        "bytes": rounded.bytes,
        "plain_bytes": rounded.plain_bytes,
        "training": {seed: result.summary() for seed, result in trained.items()},
    }


def control(bench: Bench, ways: dict[str, Any]) -> dict[str, Path]:
    folder = bench.folder / "control"
    train(
        Student.load(bench.student),
        bench.load_teacher(),
        bench.windows,
        bench.job.recipe.objective,
        qat_section(
            bench.section, bench.job.recipe.train, bench.windows.context, len(bench.windows)
        ),
        heldout=bench.heldout,
        seed=bench.job.recipe.seed,
        folder=folder,
    )
    quantize(folder / MODEL, folder / "rounded", **ways)
    return {"control": folder / MODEL, "control_quantized": folder / "rounded" / MODEL}


def exports(bench: Bench) -> dict[str, Any]:
    """Export the unrounded student in each format: seconds, bytes, and KL to the checkpoint."""
    prompts = bench.job.recipe.evaluate.prompts
    gate = Gate(bench.student, bench.heldout, prompts, bench.job.recipe.seed)
    found = {}
    for kind in FORMATS:
        began, spent = time.monotonic(), cpu_seconds()
        replay = export_gguf(gate, bench.folder / "exports" / kind, kind=kind, name="pruned")
        found[kind] = {
            "seconds": round(time.monotonic() - began, 1),
            "cpu_seconds": round(cpu_seconds() - spent, 1),
            "bytes": replay.bytes,
            "kl": replay.kl,
            "top1_agreement": replay.top1_agreement,
        }
    return found


def cpu_seconds() -> float:
    """CPU seconds of this process and its finished children; other load does not affect them."""
    return sum(os.times()[:4])


if __name__ == "__main__":
    main()

"""The cost of each quantized format: size, KL to the student itself, and KL to the teacher.

    make bench NAME=formats

The student of recipes/pruned.yaml is rounded, including its embeddings, to Stillhouse's own grids
(int8 and int4 in groups of 32, float8) and to GGUF's formats. Each format is measured twice: with
equally weighted errors, and with errors weighted by the importance of each input, which is measured
on training text. KL is measured on held-out text, which neither training nor the importance has
seen. Everything is computed in float32 from the rounded weights, so that only the rounding is
measured; the student in bfloat16 is included for comparison. k-quants are skipped if
llama-cpp-python is not installed.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from bench.common import write_results
from bench.quantize import RECIPE, trained_student
from stillhouse.commands import prepare_data
from stillhouse.data.draw_windows import draw_windows
from stillhouse.evaluation.fidelity import HeldoutAnswers, compare, heldout_answers
from stillhouse.export.gguf_export import write_form
from stillhouse.export.llama_quantizer import has_llama_cpp
from stillhouse.quantize.grid import Grid
from stillhouse.quantize.moments import Moments, input_moments
from stillhouse.quantize.quantization import Quantization
from stillhouse.quantize.units import (
    find_units,
    model_bytes,
    quantized,
    reference_answers,
    scales_of,
)
from stillhouse.teachers.load_model import load_model
from stillhouse.teachers.quiet import quiet

GRIDS = {"int8": Grid(8, 32), "float8": Grid(8, None, floating=True), "int4": Grid(4, 32)}
GGUF: tuple[str, ...] = ("q8_0", "q4_0")
K_QUANTS = ("q6_k", "q5_k_m", "q4_k_m", "q3_k_m")


@dataclass(frozen=True)
class Row:
    """Results of one form. kl: from the student itself; kl_to_teacher: from the teacher."""

    form: str
    importance: bool
    bytes: int
    kl: float
    top1_agreement: float
    kl_to_teacher: float


@dataclass(frozen=True)
class Reference:
    """The outputs that each form is compared with, on the same windows."""

    windows: list[Any]
    student: HeldoutAnswers
    teacher: HeldoutAnswers
    vocabulary: int

    def row(self, model: Any, form: str, importance: bool, size: int) -> Row:
        answers = heldout_answers(model, self.windows)
        own = compare(answers, self.student, self.vocabulary)
        teacher = compare(answers, self.teacher, self.vocabulary)
        row = Row(form, importance, size, own.kl, own.top1_agreement, teacher.kl)
        print(line(row), flush=True)
        return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--student", type=Path, help="a trained student; by default, recipes/pruned.yaml is run"
    )
    parser.add_argument("--tokens", type=int, default=4096, help="held-out tokens, to measure KL")
    parser.add_argument(
        "--importance-tokens",
        type=int,
        default=16384,
        help="tokens of training text, to measure importance",
    )
    parser.add_argument("--folder", type=Path, default=Path("runs/formats"))
    options = parser.parse_args()
    job, training, heldout = prepare_data(RECIPE, [f"folder={options.folder / 'run'}"])
    seed = job.recipe.seed
    student = options.student or trained_student(options.folder)
    windows, tokens = draw_windows(heldout, options.tokens, seed)
    calibration, seen = draw_windows(training, options.importance_tokens, seed)
    model = load_model(student, dtype=torch.float32)
    with_teacher = load_model(job.teacher.path, dtype=torch.float32)
    reference = Reference(
        windows,
        reference_answers(model, windows),
        heldout_answers(with_teacher, windows),
        job.vocabulary,
    )
    moments = input_moments(model, calibration)
    rows = [*plain(model, student, reference), *on_grids(model, reference, moments)]
    del model
    gc.collect()
    rows += in_gguf(student, reference, moments)
    figures = {
        "heldout_tokens": tokens,
        "importance_tokens": seen,
        "forms": [asdict(row) for row in rows],
    }
    write_results("formats", figures, [], seeds=[seed])


def line(row: Row) -> str:
    weighed = "importance" if row.importance else ""
    return (
        f"{row.form:<14} {weighed:<10} {row.bytes / 1e6:>7.1f} MB  KL {row.kl:.5f}, "
        f"to the teacher {row.kl_to_teacher:.4f}"
    )


def plain(model: Any, student: Path, reference: Reference) -> Iterator[Row]:
    """Measure the student as trained, and in bfloat16."""
    numbers = sum(parameter.numel() for parameter in model.parameters())
    yield reference.row(model, "float32", False, 4 * numbers)
    short = load_model(student, dtype=torch.bfloat16)
    yield reference.row(short, "bfloat16", False, 2 * numbers)


def on_grids(model: Any, reference: Reference, moments: Moments) -> Iterator[Row]:
    for name, grid in GRIDS.items():
        units = find_units(model, grid)
        size = model_bytes(model, units, set(), grid)
        for known in (None, moments):
            scales = scales_of(model, units, grid, known)
            with quantized(model, Quantization(grid, False, scales)):
                yield reference.row(model, name, known is not None, size)


def in_gguf(student: Path, reference: Reference, moments: Moments) -> Iterator[Row]:
    kinds = GGUF
    if has_llama_cpp():
        kinds += K_QUANTS
    else:
        print("k-quants: skipped, because llama-cpp-python is not installed", flush=True)
    for kind, known in itertools.product(kinds, (None, moments)):
        with gguf_file(student, kind, known) as file:
            size = file.stat().st_size
            with quiet():
                model = AutoModelForCausalLM.from_pretrained(
                    file.parent, gguf_file=file.name, dtype=torch.float32
                )
            yield reference.row(model, f"gguf-{kind}", known is not None, size)
        del model
        gc.collect()


@contextmanager
def gguf_file(student: Path, kind: str, moments: Moments | None) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="stillhouse-formats-") as folder:
        file = Path(folder) / f"{kind}.gguf"
        write_form(student, file, kind=kind, name=kind, moments=moments)
        yield file


if __name__ == "__main__":
    main()

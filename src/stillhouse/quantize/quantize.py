"""Quantize a trained student: choose which parts to leave alone, round the others, and run
quantization-aware training."""

from __future__ import annotations

import itertools
import math
import shutil
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from stillhouse.data.batches import Batches
from stillhouse.data.draw_windows import draw_windows
from stillhouse.data.windows import WindowSet
from stillhouse.errors import RecipeError
from stillhouse.hardware import default_device
from stillhouse.launch import leads
from stillhouse.objectives.objective_config import ObjectiveRecipe
from stillhouse.progress import note
from stillhouse.quantize.grid import Grid
from stillhouse.quantize.moments import input_moments
from stillhouse.quantize.qat import RoundedWeights
from stillhouse.quantize.quantization import FILE, Quantization
from stillhouse.quantize.quantize_config import QuantizeRecipe
from stillhouse.quantize.units import (
    EMBEDDINGS,
    HEAD,
    Sensitivity,
    Unit,
    choose_kept,
    find_units,
    kl_of,
    left_over_text,
    matrices,
    measure,
    model_bytes,
    reference_answers,
    scales_of,
)
from stillhouse.students.student import Student
from stillhouse.teachers.load_model import load_model, load_tokenizer
from stillhouse.teachers.model_source import AnyModel
from stillhouse.teachers.older_names import save_tokenizer
from stillhouse.teachers.quiet import quiet
from stillhouse.teachers.teacher import Teacher
from stillhouse.training.checkpoints import METRICS
from stillhouse.training.own_prompts import OwnPrompts
from stillhouse.training.train import MODEL, TrainingResult, train
from stillhouse.training.train_config import TrainRecipe

TRAINING = "training"
DEFAULT_GROUP = 32
FLOAT8_WIDTH = 16
"""torch can only multiply float8 matrices whose widths are multiples of this."""


@dataclass(frozen=True)
class QuantizeResult:
    """What was quantized, and its effect.

    group_size: None: the whole row.
    kept: units that are not quantized.
    sensitivity: of every unit, largest KL first; empty if not measured.
    kl: KL(student ‖ quantized) in nats/token, on `tokens` held-out tokens.
    bytes: size of the model, with packed codes, two bytes per scale, and two bytes per parameter
        that is not quantized.
    plain_bytes: size of the model if nothing was quantized.
    notes: for the user.
    """

    kind: str
    group_size: int | None
    kept: list[str]
    sensitivity: list[Sensitivity]
    kl: float
    tokens: int
    bytes: int
    plain_bytes: int
    notes: list[str] = field(default_factory=list)


def quantize(
    student: AnyModel,
    out: Path,
    *,
    section: QuantizeRecipe,
    heldout: WindowSet,
    vocabulary: int,
    seed: int,
    windows: WindowSet | None = None,
) -> QuantizeResult:
    """Round the trained student's matrices, and write it to `out/model` (in float32) with its
    scales next to it.

    The parts' sensitivity is measured if `max_kl` or `max_bytes` is set.

    windows: training text on which the importance of inputs is measured (`calibration_tokens`);
        None: all weights count equally.

    Raises RecipeError if the group size does not divide a matrix, the model does not have a part
    in `keep`, or `max_bytes` cannot be met.
    """
    model = load_model(student, dtype=torch.float32).to(default_device())
    grid = grid_of(section)
    units = _units(model, section)
    free = [unit for unit in units if unit.name not in section.keep]
    moments = None
    if windows is not None and section.calibration_tokens is not None:
        calibration, _ = draw_windows(windows, section.calibration_tokens, seed)
        moments = input_moments(model, calibration)
    scales = scales_of(model, free, grid, moments)
    measured, tokens = draw_windows(heldout, section.sensitivity_tokens, seed)
    reference = reference_answers(model, measured)
    kl_with = partial(kl_of, model, windows=measured, reference=reference, vocabulary=vocabulary)
    found: list[Sensitivity] = []
    kept = list(section.keep)
    if section.max_kl is not None or section.max_bytes is not None:
        found = measure(free, scales, grid, kl_with)
        smallest = model_bytes(model, units, set(kept), grid)
        kept += choose_kept(
            found, smallest=smallest, max_kl=section.max_kl, max_bytes=section.max_bytes
        )
        chosen = {name for unit in units if unit.name not in kept for name in unit.weights}
        scales = {name: scales_OG for name, scales_OG in scales.items() if name in chosen}
    quantization = Quantization(grid, section.dynamic, scales)
    kl = kl_with(quantization)
    result = QuantizeResult(
        kind=section.kind,
        group_size=grid.group,
        kept=kept,
        sensitivity=sorted(found, key=lambda s: s.kl, reverse=True),
        kl=kl,
        tokens=tokens,
        bytes=model_bytes(model, units, set(kept), grid),
        plain_bytes=model_bytes(model, [], set(), grid),
        notes=quantization_notes(model, kl, section.max_kl),
    )
    for text in result.notes:
        note(text)
    note(
        f"{section.kind}: {result.bytes / 1e6:,.1f} MB instead of "
        f"{result.plain_bytes / 1e6:,.1f} MB, KL to the unquantized student {kl:.4f}; not "
        f"quantized: {', '.join(kept) or 'nothing'}"
    )
    _save(model, quantization, student, out)
    return result


def _save(model: Any, quantization: Quantization, student: AnyModel, out: Path) -> None:
    quantization.apply(model)
    with quiet():
        model.save_pretrained(out / MODEL)
    save_tokenizer(load_tokenizer(student), out / MODEL)
    quantization.save(out / FILE)


def quantization_notes(model: Any, kl: float, max_kl: float | None) -> list[str]:
    """Notes on parts that cannot be quantized, and on a KL limit that the parts' sum meets but the
    quantized model does not."""
    notes = []
    left = left_over_text(model)
    if left is not None:
        notes.append(f"Quantization: {left}.")
    if max_kl is not None and kl > max_kl:
        notes.append(
            f"Quantization: the parts' KLs, measured one at a time, add up to at most {max_kl:g} "
            f"(quantize.max_kl), but the quantized model's KL is {kl:.3g} nats/token."
        )
    return notes


def grid_of(section: QuantizeRecipe) -> Grid:
    """The recipe's grid. The default group is 32 numbers for integers, and the row for float8."""
    if section.floating:
        return Grid(8, None, floating=True)
    return Grid(section.bits, section.group_size or DEFAULT_GROUP)


def _units(model: Any, section: QuantizeRecipe) -> list[Unit]:
    """`find_units`, but also raise RecipeError if `keep` names other parts, or if float8 kernels
    cannot multiply the matrices."""
    units = find_units(model, grid_of(section))
    names = [unit.name for unit in units]
    unknown = [name for name in section.keep if name not in names]
    if unknown:
        raise RecipeError(
            f"this student has no part named {unknown[0]!r}",
            where="quantize.keep",
            fix=f"use any of {', '.join(names)}",
        )
    if section.floating and section.dynamic:
        shapes = {name: weight.shape for name, weight in matrices(model)}
        layers = [unit.weights for unit in units if unit.name not in (EMBEDDINGS, HEAD)]
        for name in itertools.chain(*layers):
            if any(width % FLOAT8_WIDTH for width in shapes[name]):
                raise RecipeError(
                    f"{name} is {' by '.join(map(str, shapes[name]))}, but float8 kernels need "
                    f"multiples of {FLOAT8_WIDTH}",
                    where="quantize.kind",
                    fix="use kind: float8, which only rounds weights, or int8_dynamic_int8; or "
                    f"make the student's widths multiples of {FLOAT8_WIDTH}",
                )
    return units


def planned_bytes(model: Any, section: QuantizeRecipe) -> tuple[int, int]:
    """Bytes of a model, unquantized and quantized. Only uses shapes, so the model can be on the
    meta device.

    Raises the same RecipeErrors as `quantize`.
    """
    grid = grid_of(section)
    units = _units(model, section)
    smallest = model_bytes(model, units, set(section.keep), grid)
    choose_kept([], smallest=smallest, max_bytes=section.max_bytes)
    return model_bytes(model, [], set(), grid), smallest


def train_quantized(
    student: Student,
    teacher: Teacher | None,
    batches: Batches,
    objective: ObjectiveRecipe,
    settings: TrainRecipe,
    *,
    quantized: Path,
    section: QuantizeRecipe,
    folder: Path,
    heldout: Batches | None = None,
    seed: int = 0,
    prompts: OwnPrompts | None = None,
    base: Path = Path(),
) -> TrainingResult:
    """Continue distilling the unquantized student, with its weights rounded at every step.

    quantized: the folder that `quantize` wrote, which determines the matrices and their scales.
    settings: of the previous training.
    folder: where the same files are written for the trained student.

    See `train` for the other arguments.
    """
    quantization = Quantization.load(quantized / FILE)
    result = train(
        student,
        teacher,
        batches,
        objective,
        qat_section(section, settings, batches.context, len(batches)),
        heldout=heldout,
        seed=seed,
        folder=folder / TRAINING,
        callbacks=[RoundedWeights(quantization)],
        prompts=prompts,
        base=base,
    )
    if leads():
        # Load it from its file, because a process might only have part of it in memory.
        trained = Student.load(student.checkpoint(folder / TRAINING / MODEL))
        quantization.apply(trained.model)
        trained.save(folder / MODEL)
        quantization.save(folder / FILE)
        shutil.copy(folder / TRAINING / METRICS, folder / METRICS)
    return result


def qat_section(
    section: QuantizeRecipe, recipe: TrainRecipe, context: int, windows: int
) -> TrainRecipe:
    """The training recipe for `qat.tokens` tokens at `qat.learning_rate`. windows: how many there
    are."""
    assert section.qat is not None
    steps = math.ceil(section.qat.tokens / (recipe.batch_size * context))
    return recipe.model_copy(
        update={
            "learning_rate": section.qat.learning_rate,
            "max_steps": steps,
            "epochs": float(math.ceil(steps * recipe.batch_size / windows)),
            # Weights are not rounded between steps, so an evaluation would measure another model.
            "evaluate_every": None,
            "early_stop": None,
        }
    )

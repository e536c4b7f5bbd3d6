"""Plans the student and the training text of the recipes that `stillhouse init` writes, so that a
first result takes about a quarter of an hour."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stillhouse import account
from stillhouse.errors import ModelError
from stillhouse.init_answers import SIZES, InitAnswers
from stillhouse.init_general import (
    GeneralChats,
    answers_briefly,
    chats_beside,
    general_chats,
)
from stillhouse.init_sources import has_chats, source_tokens
from stillhouse.language_model.calibration_check import ROWS_PER_NEURON
from stillhouse.language_model.expected_time import PRUNING_PASSES
from stillhouse.number_format import seconds
from stillhouse.planning.machine import Machine, this_machine
from stillhouse.planning.model_size import ModelSize, config_size
from stillhouse.progress import note
from stillhouse.pruning.axes import axes_of
from stillhouse.students.student_config import PrunedStudent
from stillhouse.teachers.load_model import load_config, load_tokenizer
from stillhouse.teachers.model_source import resolve_model

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
_CLASSIFIER_LAYERS = {"small": 4, "medium": 6, "large": 10}
_MOST_HELDOUT, _HELDOUT_SHARE, _HELDOUT_STEP = 8192, 0.1, 256
"""The maximum number of held-out tokens, their share of the text, and what they are a multiple
of."""


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


def planned(answers: InitAnswers) -> dict[str, Any]:
    """Return the template variables about the student and its text: start, layers, ffn_size,
    amounts, learning_rate, heldout_tokens, general (`GeneralChats` or None), and own (the number of
    tokens to use from each source)."""
    start = None if answers.size in SIZES else answers.size
    found: dict[str, Any] = {"start": start, "layers": None, "ffn_size": None, "amounts": None}
    if answers.job == "distill":
        return found | _distilled(answers, start)
    if start is not None:
        return found
    config = load_config(resolve_model(answers.teacher, base=Path.cwd(), weights=False).path)
    if answers.job == "classify":
        depth = config.get_text_config().num_hidden_layers
        return found | {"layers": Kept(min(_CLASSIFIER_LAYERS[answers.size], depth), depth)}
    sizes = pruned_sizes(config, SIZES[answers.size])
    return found | {"layers": sizes.layers, "ffn_size": sizes.ffn_size}


def _distilled(answers: InitAnswers, start: str | None) -> dict[str, Any]:
    """Plan a distillation. start: the model that the student starts from; None if the student is
    cut from the teacher."""
    sizes = source_tokens(answers.sources)
    own = sum(sizes)
    found: dict[str, Any] = {"general": None, "own": [None] * len(sizes)}
    found["learning_rate"] = LEARNING_RATES.get(answers.size, NEAR_RATE)
    try:
        path = resolve_model(answers.teacher, base=Path.cwd(), weights=False).path
        config = load_config(path)
    except ModelError:
        if start is None:
            raise
        held = found["heldout_tokens"] = _heldout(own)
        # `check` reports what is wrong with the teacher.
        return found | {"amounts": unlimited(max(1.0, own - held))}
    teacher = config_size(config)
    student: float = teacher.active  # an upper bound for a student that starts from another model
    beside = neurons = 0
    if start is None:
        shape = pruned_sizes(config, SIZES[answers.size])
        student = shape.active
        found |= {"layers": shape.layers, "ffn_size": shape.ffn_size}
        neurons = 0 if shape.ffn_size is None else shape.ffn_size.kept
        beside = chats_beside(own) if answers_briefly(load_tokenizer(path)) else 0
    held = found["heldout_tokens"] = _heldout(own + beside)
    tokens = max(1.0, own + beside - held)
    machine = this_machine("auto", timed=True)
    learned = found["amounts"] = amounts(tokens, teacher, student, machine, neurons=neurons)
    if beside:
        used = held + min(tokens, learned.train_tokens or tokens)
        general = found["general"] = general_chats(sizes, used)
        found["own"] = general.own
    _note_training(learned)
    _note_text(answers, found["general"])
    _note_size(answers, learned.trained)
    return found


def _heldout(tokens: float) -> int:
    steps = max(1, int(_HELDOUT_SHARE * tokens / _HELDOUT_STEP))
    return min(_MOST_HELDOUT, steps * _HELDOUT_STEP)


# --- sizes and amounts --------------------------------------------------------------------------


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
    narrow = copy.deepcopy(config)
    narrow.intermediate_size = width // 2
    neuron = (size.layer - config_size(narrow).layer) / (width - width // 2)
    step = 32 if width >= 512 else 8  # GGUF's quantized formats need multiples of 32
    wanted = max(width - (1 - share) * size.layer / neuron, width * NARROWEST)
    ffn = Kept(max(step, round(wanted / step) * step), width)
    layer = size.layer - (width - ffn.kept) * neuron
    layers = Kept(min(depth, max(1, round(depth * share * size.layer / layer))), depth)
    return PrunedSizes(layers, ffn, size.active - depth * size.layer + layers.kept * layer)


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


# --- messages ------------------------------------------------------------------------------------


def _note_training(found: Amounts) -> None:
    shown = f"{found.trained:,.0f} tokens"
    if found.trained < LEAST_TRAINED:
        note(f"training on only {shown}: the text is too short to learn much from it")
    else:
        note(
            f"training on {shown} takes about {seconds(found.seconds)} on this machine; more "
            "tokens make a better student"
        )


def _note_text(answers: InitAnswers, general: GeneralChats | None) -> None:
    """Print what the student learns from its text, and what it does not."""
    chats = has_chats(answers.sources)
    if general is not None:
        without = (
            "would only answer questions like those in your chats"
            if chats
            else "could only continue such text"
        )
        note(
            f"adding {general.prompts} general questions, answered by the teacher, to your text: "
            f"without them, the student {without}. To leave them out, remove `synthesize` and its "
            "source from the recipe"
        )
    elif chats:
        note(
            "the student learns to answer questions like those in your chats, and will answer "
            "other questions worse than the teacher: to keep other topics, add chats about them"
        )
    else:
        note(
            "your text has no questions and answers, so the student only learns to continue it. To "
            "keep the teacher's ability to answer questions, train on chats "
            "(docs/data.md#row-formats)"
        )


def _note_size(answers: InitAnswers, trained: float) -> None:
    if SIZES.get(answers.size, 1.0) < SIZES["large"] and trained < SENSIBLE_TOKENS:
        note(
            f"a {answers.size} student needs far more text to write well: expect broken sentences. "
            "Use size large for a first result, or raise data.train_tokens in the recipe"
        )

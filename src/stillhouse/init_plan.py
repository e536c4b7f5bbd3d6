"""Plans the student and the training text of the recipes that `stillhouse init` writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stillhouse.data.sources import CHARACTERS_PER_TOKEN
from stillhouse.errors import ModelError
from stillhouse.init_amounts import (
    LEARNING_RATES,
    LEAST_TRAINED,
    NEAR_RATE,
    SENSIBLE_TOKENS,
    Amounts,
    Kept,
    amounts,
    pruned_sizes,
    unlimited,
)
from stillhouse.init_answers import SIZES, InitAnswers
from stillhouse.init_general import (
    GeneralChats,
    answers_briefly,
    chats_beside,
    general_chats,
)
from stillhouse.init_sources import CORPUS, has_chats, source_sizes
from stillhouse.number_format import seconds
from stillhouse.planning.machine import this_machine
from stillhouse.planning.model_size import config_size
from stillhouse.progress import note
from stillhouse.teachers.load_model import load_config, load_tokenizer
from stillhouse.teachers.model_source import resolve_model

_CLASSIFIER_LAYERS = {"small": 4, "medium": 6, "large": 10}
_MOST_HELDOUT, _HELDOUT_SHARE, _HELDOUT_STEP = 8192, 0.1, 256
"""The maximum number of held-out tokens, their share of the text, and what they are a multiple
of."""
_CORPUS_TOKENS = 110_000
"""The size of the bundled text."""


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
    sizes = _source_tokens(answers)
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


def _source_tokens(answers: InitAnswers) -> list[float]:
    """Estimate the number of tokens in each source of the training text."""
    if answers.data == CORPUS:
        return [_CORPUS_TOKENS]
    return [size / CHARACTERS_PER_TOKEN for size in source_sizes(answers.sources)]


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

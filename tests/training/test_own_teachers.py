"""Which teachers can score text that the student generates, and with which divergences."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from stillhouse.data.batches import NoText
from stillhouse.data.data import Data
from stillhouse.errors import ModelError, SignalError
from stillhouse.objectives.objective_config import ObjectiveRecipe
from stillhouse.python_api import record
from stillhouse.signals.encodings import TopK
from stillhouse.signals.signals_config import SignalServer
from stillhouse.students.student import Student
from stillhouse.teachers.local_teacher import LocalTeacher
from stillhouse.teachers.served_teacher import ServedTeacher
from stillhouse.teachers.several_teachers import SeveralTeachers
from stillhouse.teachers.teacher import Teacher
from stillhouse.training.draw_rollouts import local_generator
from stillhouse.training.on_policy import OnPolicy
from stillhouse.training.own_prompts import OwnPrompts
from stillhouse.training.step_rows import Micro
from stillhouse.training.train import train
from stillhouse.training.train_config import OnPolicyRecipe, TrainRecipe
from tests import tiny

PROMPTS = OwnPrompts.of([[5, 6, 7], [8, 9]])


def own(**section: Any) -> OnPolicy:
    return OnPolicy(
        OnPolicyRecipe.model_validate({"share": 1.0, "max_tokens": 4, **section}),
        PROMPTS,
        NoText(32),
        batch=2,
        steps=2,
        micro=Micro(2, 0, 1),
        generator=partial(local_generator, 2, torch.float32),
        seed=0,
        folder=None,
    )


def student() -> Student:
    return Student(tiny.llama(seed=1), tiny.tokenizer())


def local() -> LocalTeacher:
    return LocalTeacher(tiny.llama(), tiny.tokenizer())


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stored")
    options: dict[str, Any] = {"packing": "none", "context": 32, "heldout_tokens": 128}
    data = Data.build(tiny.text(60).splitlines(), tiny.tokenizer(), **options)
    record(local(), data, folder / "store", encoding=TopK(4))
    return folder / "store"


def test_a_store_cannot_score_own_text(store: Path) -> None:
    with pytest.raises(SignalError, match="cannot score text that the student generates") as error:
        own().prepare(student(), Teacher.stored(store))
    assert error.value.fix is not None
    assert "signals.missing: live" in error.value.fix


def test_the_live_teacher_of_a_store_scores_own_text_itself(store: Path) -> None:
    """Its distributions are complete, not limited to the entries that the store keeps."""
    live = local()
    text = own()
    text.prepare(student(), Teacher.stored(store, missing=live))
    assert text.teacher is live


def test_each_of_several_teachers_scores_own_text(store: Path) -> None:
    live, other = local(), local()
    text = own()
    text.prepare(student(), SeveralTeachers([Teacher.stored(store, missing=live), other]))
    assert isinstance(text.teacher, SeveralTeachers)
    assert text.teacher.teachers == (live, other)


def served() -> ServedTeacher:
    section = SignalServer(base_url="http://127.0.0.1:9/v1", model="tiny")
    return ServedTeacher(section, k=4, vocabulary=len(tiny.tokenizer()))


def test_a_note_states_the_bias_of_a_served_teacher(capfd: pytest.CaptureFixture[str]) -> None:
    own().prepare(student(), served())
    assert "tokens of the tail are not distinguished" in capfd.readouterr().err


@pytest.mark.parametrize("term", [{"divergence": "adaptive_kl"}, {"temperature": 2.0}])
def test_terms_that_a_served_teacher_cannot_serve_are_rejected(term: dict[str, Any]) -> None:
    with pytest.raises(SignalError):
        own(terms=[term]).prepare(student(), served())


def test_a_served_teacher_cannot_generate_the_beginning_of_answers() -> None:
    with pytest.raises(SignalError, match="cannot generate the beginning of answers"):
        own(teacher_tokens=2).prepare(student(), served())


def test_own_text_requires_a_teacher() -> None:
    with pytest.raises(SignalError, match="there is no teacher"):
        own().prepare(student(), None)


def test_a_teacher_that_ends_turns_with_another_token_is_rejected() -> None:
    words = tiny.tokenizer()
    words.chat_template = tiny.CHAT_TEMPLATE.replace("<|end|>", "<|system|>")
    words.eos_token = "<|system|>"
    with pytest.raises(ModelError, match="never learn to end its answers"):
        own().prepare(student(), LocalTeacher(tiny.llama(), words))


@pytest.mark.run
def test_the_gradient_depends_on_the_teacher() -> None:
    """The gradient of a sampled log-ratio used as the loss (k1) would not depend on it."""
    norms = []
    for seed in (0, 2):
        result = train(
            student(),
            LocalTeacher(tiny.llama(seed=seed), tiny.tokenizer()),
            NoText(32),
            ObjectiveRecipe(),
            TrainRecipe.model_validate(
                {
                    "batch_size": 2,
                    "max_steps": 1,
                    "precision": "float32",
                    "on_policy": {"share": 1.0, "max_tokens": 4},
                }
            ),
            prompts=PROMPTS,
        )
        norms.append(next(row["grad_norm"] for row in result.metrics if "loss" in row))
    assert abs(norms[0] - norms[1]) > 1e-3 * norms[0]

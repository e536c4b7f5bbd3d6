"""Creating a student in memory, and which of its weights are trained."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from stillhouse.data.data import Data
from stillhouse.errors import ModelError, RecipeError
from stillhouse.signals.signals_config import SignalServer
from stillhouse.students.student import Student
from stillhouse.teachers.local_teacher import LocalTeacher
from stillhouse.teachers.served_teacher import ServedTeacher
from tests import tiny


@pytest.fixture(scope="module")
def data() -> Data:
    return Data.build(tiny.text(200).splitlines(), tiny.tokenizer(), context=32, heldout_tokens=256)


@pytest.fixture
def teacher() -> LocalTeacher:
    return LocalTeacher(tiny.llama(intermediate_size=512), tiny.tokenizer())


def test_pruning_gives_the_requested_sizes_and_leaves_the_teacher_unchanged(
    teacher: LocalTeacher, data: Data
) -> None:
    before = copy.deepcopy(teacher.model.state_dict())
    student = Student.prune(teacher, data, layers=2, ffn_size=64, calibration_tokens=512)
    assert student.model.config.num_hidden_layers == 2
    assert student.model.config.intermediate_size == 64
    assert student.summary["pruning"]["layers"] == (3, 2)
    after = teacher.model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_pruning_to_a_share_of_the_parameters_meets_it(teacher: LocalTeacher, data: Data) -> None:
    student = Student.prune(teacher, data, params="60%", calibration_tokens=512)
    share = student.model.num_parameters() / teacher.model.num_parameters()
    assert 0.57 <= share <= 0.6


def test_a_student_is_pruned_from_the_checkpoint_and_not_from_a_rounded_copy(
    data: Data, tmp_path: Path
) -> None:
    folder = tiny.save_model(tmp_path / "teacher", dtype="float32")
    low = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    teacher = LocalTeacher(low, tiny.tokenizer(), source=folder)
    student = Student.prune(teacher, data, layers=2, calibration_tokens=512, reconstruct=False)
    kept = student.model.get_input_embeddings().weight
    exact = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert torch.equal(kept, exact.get_input_embeddings().weight)


def test_a_random_student_depends_on_the_seed_and_the_overrides(teacher: LocalTeacher) -> None:
    first, again, other = (
        Student.random(teacher, hidden_size=16, seed=seed).model for seed in (1, 1, 2)
    )
    weights = [model.get_input_embeddings().weight for model in (first, again, other)]
    assert weights[0].shape[1] == 16
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_a_random_student_has_the_tokens_of_its_tokenizer(teacher: LocalTeacher) -> None:
    config = tiny.llama(vocab_size=50, bos_token_id=7, eos_token_id=8).config
    student = Student.random(config, teacher.tokenizer, num_hidden_layers=1)
    assert student.vocabulary == student.model.config.vocab_size == 260
    assert student.model.generation_config.eos_token_id == teacher.tokenizer.eos_token_id
    assert config.vocab_size == 50, "the given configuration is unchanged"


def test_a_saved_student_can_be_loaded_as_pretrained(teacher: LocalTeacher, tmp_path: Path) -> None:
    student = Student.random(teacher, num_hidden_layers=1)
    student.save(tmp_path / "out")
    again = Student.pretrained(tmp_path / "out")
    assert again.vocabulary == student.vocabulary == 260
    left, right = student.model.state_dict(), again.model.state_dict()
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_a_frozen_head_also_freezes_tied_embeddings() -> None:
    student = Student(tiny.llama())
    student.trainable(freeze_head=True)
    still = {name for name, p in student.model.named_parameters() if not p.requires_grad}
    assert still == {"model.embed_tokens.weight"}
    assert student.frozen_head is not None
    student.trainable()
    assert student.frozen_head is None


def test_a_bfloat16_model_is_trained_in_float32() -> None:
    student = Student(tiny.llama().bfloat16())
    student.trainable()
    assert {p.dtype for p in student.model.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer": 2}, "no option layer"),
        ({"layers": 2, "params": "60%"}, "a target or sizes, not both"),
        ({"params": "many"}, "many is not a valid amount"),
        ({"decode_latency": "60%"}, "only be checked by measuring"),
        ({"vocabulary": 100}, "only in recipes"),
        ({"layers": 9}, "the teacher has 3"),
    ],
)
def test_invalid_pruning_options_are_rejected(
    teacher: LocalTeacher, data: Data, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        Student.prune(teacher, data, **options)


def test_only_a_model_on_this_machine_can_be_pruned(data: Data) -> None:
    server = SignalServer(base_url="http://localhost:1/v1", model="far")
    with pytest.raises(ModelError, match=r"far at .* is not loaded here"):
        Student.prune(ServedTeacher(server, k=2, vocabulary=260), data, layers=2)


def test_repr_shows_the_model() -> None:
    assert "parameters in float32 on cpu, 260 tokens" in repr(Student(tiny.llama()))


def test_a_generation_config_that_transformers_only_warns_of_is_saved(tmp_path: Path) -> None:
    """transformers itself refuses to save such settings once the end tokens have changed."""
    file = tiny.save_model(tmp_path / "start") / "generation_config.json"
    file.write_text('{"temperature": 0.9, "eos_token_id": 2}')
    student = Student.load(file.parent)
    student.save(tmp_path / "saved")
    saved = Student.load(tmp_path / "saved").model.generation_config
    assert saved.temperature == 0.9
    assert saved.eos_token_id != 2

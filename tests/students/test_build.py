"""Every way to start a student gives a float32 checkpoint, its tokenizer, and a summary."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from stillhouse import account
from stillhouse.errors import ModelError, RecipeError, RunError
from stillhouse.students import pruned_student as making
from stillhouse.students.build_student import build_student
from stillhouse.students.student_config import PretrainedStudent, PrunedStudent, RandomStudent
from stillhouse.teachers.load_model import load_model, load_tokenizer
from stillhouse.teachers.model_source import ModelSource, resolve_model
from tests.teachers.toys import ToyWindows, save_model, tiny_model, toy_tokenizer


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    place = tmp_path_factory.mktemp("teacher")
    save_model(place / "model", tokenizer=toy_tokenizer(template="{{ messages }}"))
    return resolve_model("model", base=place, cache=place / "cache")


def build(section: Any, teacher: ModelSource, tmp_path: Path, seed: int = 0) -> dict[str, Any]:
    summary = build_student(
        section,
        teacher=teacher,
        windows=ToyWindows(),
        seed=seed,
        base=tmp_path,
        out=tmp_path / "student",
    )
    assert json.loads(json.dumps(summary))["start"] == section.start
    return summary


def parameters(folder: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = load_model(folder, dtype=torch.float32).state_dict()
    return state


def test_a_pruned_student_has_the_requested_sizes_and_a_summary(
    teacher: ModelSource, tmp_path: Path
) -> None:
    summary = build(PrunedStudent(start="pruned", ffn_size=40, layers=2), teacher, tmp_path)
    student = load_model(tmp_path / "student", dtype=torch.float32)
    assert student.config.num_hidden_layers == 2
    assert student.config.intermediate_size == 40
    assert summary["parameters"]["total"] == student.num_parameters()
    assert summary["teacher_parameters"]["total"] == tiny_model().num_parameters()
    assert tuple(summary["pruning"]["layers"]) == (3, 2)
    assert "calibrated on all" in summary["notes"][0]
    # Lower bound: two passes over the calibration rows, each with half of the parameters.
    least = account.forward_flops(2 * tiny_model().num_parameters() // 2, ToyWindows().ids.numel())
    assert summary["flops"] > least
    assert load_tokenizer(tmp_path / "student").chat_template == "{{ messages }}"


@pytest.mark.parametrize(
    ("short", "importance", "expected"),
    [
        (0, "refit", ("cuda", False)),
        (1, "refit", ("cuda", True)),
        (1, "gradients", ("cpu", False)),
        (10**6, "refit", ("cpu", False)),
    ],
)
def test_free_memory_decides_where_a_model_is_pruned(
    monkeypatch: pytest.MonkeyPatch, short: int, importance: str, expected: tuple[str, bool]
) -> None:
    """short: how many bytes too few are free for the whole model to be on the GPU."""
    model = tiny_model()
    section = PrunedStudent.model_validate(
        {"start": "pruned", "ffn_size": 40, "importance": importance}
    )
    streams = 4 * making.STREAMS * 4096 * model.config.hidden_size
    needed = 4 * model.num_parameters() + streams + making.moment_bytes(model.config)
    monkeypatch.setattr(making, "default_device", lambda: torch.device("cuda", 0))
    monkeypatch.setattr(making, "free_memory_bytes", lambda _: needed - short)
    device, by_layer = making.placement(section, model, 4096)
    assert (device.type, by_layer) == expected


def test_pruning_to_an_impossible_size_is_rejected(teacher: ModelSource, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="the teacher has 3"):
        build(PrunedStudent(start="pruned", layers=7), teacher, tmp_path)
    assert not (tmp_path / "student").exists()


def test_a_random_student_is_seeded_without_changing_the_global_seed(
    teacher: ModelSource, tmp_path: Path
) -> None:
    section = RandomStudent(start="random", overrides={"hidden_size": 16})
    found = []
    for seed in (1, 1, 2):
        before = torch.get_rng_state()
        build(section, teacher, tmp_path, seed)
        assert torch.equal(torch.get_rng_state(), before)
        found.append(parameters(tmp_path / "student"))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    assert any(not torch.equal(found[0][name], found[2][name]) for name in found[0])
    assert found[0]["model.layers.0.self_attn.q_proj.weight"].shape == (16, 16)


def test_a_random_student_can_use_another_configuration(
    teacher: ModelSource, tmp_path: Path
) -> None:
    tiny_model("qwen3").config.save_pretrained(tmp_path / "start")
    build(RandomStudent(start="random", config="start"), teacher, tmp_path)
    assert load_model(tmp_path / "student", dtype=torch.float32).config.model_type == "qwen3"


def test_a_random_student_gets_the_tokenizers_vocabulary(
    teacher: ModelSource, tmp_path: Path
) -> None:
    """The student's vocabulary and special tokens are those of the tokenizer."""
    other = {"vocab_size": 50, "bos_token_id": 7, "eos_token_id": 8, "pad_token_id": 9}
    tiny_model("qwen3", **other).config.save_pretrained(tmp_path / "start")
    build(RandomStudent(start="random", config="start"), teacher, tmp_path)
    student = load_model(tmp_path / "student", dtype=torch.float32)
    found = {key: getattr(student.config, key) for key in other}
    assert found == {"vocab_size": 96, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
    assert student.generation_config.eos_token_id == 2


def test_a_random_student_with_too_small_a_vocabulary_is_rejected(
    teacher: ModelSource, tmp_path: Path
) -> None:
    section = RandomStudent(start="random", overrides={"vocab_size": 95})
    with pytest.raises(RecipeError, match=r"vocab_size is 95, but .* has 96 tokens") as caught:
        build(section, teacher, tmp_path)
    assert caught.value.where == "student.overrides.vocab_size"
    assert "at least 96" in str(caught.value.fix)


def test_a_pretrained_student_keeps_its_weights(teacher: ModelSource, tmp_path: Path) -> None:
    save_model(tmp_path / "small", tiny_model("qwen3", vocab_size=104, seed=3))
    summary = build(PretrainedStudent(start="pretrained", model="small"), teacher, tmp_path)
    assert summary["vocabulary"]["rows"] == 96
    assert summary["vocabulary"]["student_padding"] == 8
    assert "chat templates" in summary["notes"][0]
    original, saved = parameters(tmp_path / "small"), parameters(tmp_path / "student")
    assert all(torch.equal(original[name], saved[name]) for name in original)


def test_a_pretrained_student_with_another_vocabulary_is_rejected(
    teacher: ModelSource, tmp_path: Path
) -> None:
    save_model(tmp_path / "small", tokenizer=toy_tokenizer(swap=True))
    with pytest.raises(ModelError, match="2 tokens differ"):
        build(PretrainedStudent(start="pretrained", model="small"), teacher, tmp_path)


def test_a_file_in_place_of_the_students_folder_is_reported(
    teacher: ModelSource, tmp_path: Path
) -> None:
    (tmp_path / "student").write_text("a file is in the way")
    with pytest.raises(RunError, match="a file where a folder should be"):
        build(PrunedStudent(start="pruned", ffn_size=40), teacher, tmp_path)

"""A complete evaluation of a tiny run."""

from __future__ import annotations

import functools
import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from stillhouse.errors import ModelError, RunError
from stillhouse.evaluation.evaluate import evaluate
from stillhouse.evaluation.evaluate_config import EvaluateRecipe
from stillhouse.evaluation.fidelity import compare, heldout_answers
from stillhouse.evaluation.results import Evaluation
from stillhouse.evaluation.speed import measure_rates
from stillhouse.hardware import Precision
from stillhouse.teachers.model_source import ModelSource
from stillhouse.teachers.weights import stored_dtypes
from tests.clocks import Clock

from .toys import VOCABULARY, mixed_windows, save_toy, toy_model

pytestmark = pytest.mark.run

FLOAT32 = Precision(torch.float32, "float32, for the test")


@dataclass(frozen=True)
class Run:
    paths: dict[str, Path]
    evaluation: Evaluation


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """With a clock that advances a second per reading, prefill and decoding take a second each."""
    folder = tmp_path_factory.mktemp("run")
    paths = {
        "student": save_toy(folder / "student", toy_model(1, layers=1)),
        "teacher": save_toy(folder / "teacher", toy_model(0)),
    }
    section = EvaluateRecipe(prompts=["the cat", "run"], max_new_tokens=4, speed=True)
    rates = functools.partial(measure_rates, clock=Clock(tick=1.0).read)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            importlib.import_module("stillhouse.evaluation.evaluate"), "measure_rates", rates
        )
        evaluation = evaluate(
            paths,
            section=section,
            windows=mixed_windows(),
            seed=0,
            vocabulary=VOCABULARY,
            precision=FLOAT32,
        )
    return Run(paths, evaluation)


def test_the_teacher_comes_first_and_is_compared_with_itself(run: Run) -> None:
    assert [model.role for model in run.evaluation.models] == ["teacher", "student"]
    teacher = run.evaluation.models[0].fidelity
    assert (teacher.kl, teacher.top1_agreement) == (0.0, 1.0)


def test_the_student_is_compared_with_the_teacher(run: Run) -> None:
    student, teacher = toy_model(1, layers=1), toy_model(0)
    windows = mixed_windows()
    expected = compare(
        heldout_answers(student, windows), heldout_answers(teacher, windows), VOCABULARY
    )
    assert run.evaluation.models[1].fidelity == expected


def test_a_model_is_measured_after_prepare_has_changed_it(run: Run) -> None:
    """With its last norm doubled, the model differs from its checkpoint."""

    def double(model: Any) -> None:
        with torch.no_grad():
            model.model.norm.weight.mul_(2)

    found = evaluate(
        run.paths,
        section=EvaluateRecipe(speed=False),
        windows=mixed_windows(),
        seed=0,
        vocabulary=VOCABULARY,
        precision=FLOAT32,
        prepare={"student": double},
    )
    student, teacher, windows = toy_model(1, layers=1), toy_model(0), mixed_windows()
    double(student)
    expected = compare(
        heldout_answers(student, windows), heldout_answers(teacher, windows), VOCABULARY
    )
    assert found.models[1].fidelity == expected
    assert found.models[1].fidelity != run.evaluation.models[1].fidelity


def test_sizes_are_those_of_the_checkpoint(run: Run) -> None:
    student = run.evaluation.models[1]
    model = toy_model(1, layers=1)
    assert student.parameters == sum(p.numel() for p in model.parameters())
    assert student.parameters - student.non_embedding_parameters == 2 * VOCABULARY * 32
    file = run.paths["student"] / "model.safetensors"
    assert student.bytes_on_disk == file.stat().st_size


def test_speed_and_memory_are_measured_for_every_model(run: Run) -> None:
    for model in run.evaluation.models:
        assert model.speed is not None
        assert model.speed.prefill_tokens_per_s > model.speed.decode_tokens_per_s > 0
        assert model.speed.peak_memory_bytes > 100 << 20  # torch alone


def test_models_of_equal_shape_share_their_measurements(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = importlib.import_module("stillhouse.evaluation.evaluate")
    measured: list[Path] = []

    def peak(model: ModelSource, *_: Any, **__: Any) -> int:
        measured.append(model.path)
        return len(measured)

    monkeypatch.setattr(module, "measure_peak_memory", peak)
    model = toy_model(2, layers=1)
    model.config.use_cache = False  # not part of the shape
    untrained = save_toy(tmp_path / "untrained", model)
    found = evaluate(
        {**run.paths, "untrained": untrained},
        section=EvaluateRecipe(speed=True),
        windows=mixed_windows(),
        seed=0,
        vocabulary=VOCABULARY,
        precision=FLOAT32,
    )
    assert measured == [run.paths["teacher"], run.paths["student"]]
    teacher, student, other = (found.result(r) for r in ("teacher", "student", "untrained"))
    assert teacher is not None
    assert student is not None
    assert other is not None
    assert other.speed == student.speed != teacher.speed
    assert any("same shape" in note for note in found.notes)
    assert not any("same shape" in note for note in run.evaluation.notes)


def test_training_that_did_not_help_is_a_warning_and_the_first_note(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    found = evaluate(
        {**run.paths, "untrained": run.paths["teacher"]},
        section=EvaluateRecipe(speed=False),
        windows=mixed_windows(),
        seed=0,
        vocabulary=VOCABULARY,
        precision=FLOAT32,
    )
    assert "no closer to the teacher after training" in found.notes[0]
    shown = " ".join(capsys.readouterr().err.split())
    assert f"warning: {found.notes[0]}" in shown


def test_memory_is_measured_with_weights_stored_in_the_dtype_in_use(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file in a different dtype would be in memory in addition to the model."""
    measured: list[Path] = []

    def peak(model: ModelSource, *_: Any, **__: Any) -> int:
        assert stored_dtypes(model.path) == {"BF16"}
        measured.append(model.path)
        return 1

    # The package has a function of the module's name.
    module = importlib.import_module("stillhouse.evaluation.evaluate")
    monkeypatch.setattr(module, "measure_peak_memory", peak)
    as_used = save_toy(run.paths["student"].with_name("as-used"), toy_model(1, layers=1).bfloat16())
    evaluate(
        {"teacher": run.paths["teacher"], "student": as_used},
        section=EvaluateRecipe(speed=True),
        windows=mixed_windows(),
        seed=0,
        vocabulary=VOCABULARY,
        precision=Precision(torch.bfloat16, "bfloat16, for the test"),
    )
    assert measured[1] == as_used
    assert measured[0] != run.paths["teacher"]
    assert not measured[0].exists()


def test_generations_are_side_by_side(run: Run) -> None:
    assert [generation.prompt for generation in run.evaluation.generations] == ["the cat", "run"]
    for generation in run.evaluation.generations:
        assert list(generation.answers) == ["teacher", "student"]


def test_the_notes_explain_how_it_was_measured(run: Run) -> None:
    text = " ".join(run.evaluation.notes)
    tokens = run.evaluation.models[0].fidelity.tokens
    assert f"{tokens} tokens in 6 held-out windows" in text
    assert "float32, for the test" in text
    assert f"{torch.get_num_threads()} threads" in text


def test_the_size_can_be_that_of_the_exported_dtype(run: Run) -> None:
    evaluation = evaluate(
        run.paths,
        section=EvaluateRecipe(speed=False),
        windows=mixed_windows(),
        seed=0,
        vocabulary=VOCABULARY,
        precision=FLOAT32,
        export_dtype=torch.bfloat16,
    )
    for model in evaluation.models:
        assert model.bytes_on_disk == 2 * model.parameters
        assert model.speed is None
    assert evaluation.generations == []


def test_evaluation_without_a_teacher_is_an_error(run: Run) -> None:
    with pytest.raises(ModelError, match="needs a teacher"):
        evaluate(
            {"student": run.paths["student"]},
            section=EvaluateRecipe(),
            windows=mixed_windows(),
            seed=0,
            vocabulary=VOCABULARY,
            precision=FLOAT32,
        )


@pytest.mark.parametrize("text", ["", "{", "[]", '{"models": 3}', "\xff", "[" * 100_000])
def test_a_damaged_evaluation_is_one_error(tmp_path: Path, text: str) -> None:
    path = tmp_path / "evaluation.json"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(RunError, match="the evaluation cannot be read"):
        Evaluation.load(path)

"""All forms of the model, compared by bytes and speed in a table and in charts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from stillhouse.evaluation.results import Evaluation
from stillhouse.report.formats import form_charts, form_table, forms
from stillhouse.report.language_model_report import language_model_report
from stillhouse.report.page import render
from stillhouse.report.sections import RunFacts


def test_teacher_checkpoint_and_every_export_are_forms(
    evaluation: Evaluation, replays: list[dict[str, Any]]
) -> None:
    models = {model.role: model for model in evaluation.models}
    found = forms(models, replays)
    assert [form.name for form in found] == ["Teacher", "Checkpoint", "safetensors", "gguf-q4_k_m"]
    teacher, checkpoint, plain, quantized = found
    assert teacher.kl == 0
    assert teacher.speedup == pytest.approx(20 / 25), "from the evaluation, both in one dtype"
    assert checkpoint.kl == 0.482
    assert checkpoint.bytes == 4 * models["student"].parameters
    assert plain.speedup == pytest.approx(30 / 20)
    assert quantized.speedup is None, "its runtime was not installed"
    assert [cell.value for cell in form_table(found).rows[3].cells[3:]] == ["–", "–"]


def test_a_quantized_student_has_a_form_in_full_precision_and_one_on_the_grid(
    evaluation: Evaluation,
    replays: list[dict[str, Any]],
) -> None:
    models = {model.role: model for model in evaluation.models}
    student = models["student"]
    small = replace(student, role="quantized", bytes_on_disk=60_000_000, speed=None)
    found = forms({**models, "quantized": small}, replays)
    names = ["Teacher", "Student", "On the grid", "safetensors", "gguf-q4_k_m"]
    assert [form.name for form in found] == names
    _, whole, grid = found[:3]
    assert whole.bytes == student.bytes_on_disk
    assert (whole.kl, whole.top1_agreement) == (0.481, 0.662), "from the evaluation"
    assert grid.bytes == 60_000_000
    assert (grid.kl, grid.tokens_per_s) == (0.482, 20.0)
    trained = replace(small, role="quantized_trained", bytes_on_disk=50_000_000)
    both = forms({**models, "quantized": small, "quantized_trained": trained}, replays)
    assert both[2].bytes == 50_000_000, "the model after the last training is exported"
    size, speed = form_charts(found)
    assert "Student: " in size.alt
    assert "On the grid: " in speed.alt


def test_charts_leave_out_forms_that_were_not_measured(
    evaluation: Evaluation, replays: list[dict[str, Any]]
) -> None:
    models = {model.role: model for model in evaluation.models}
    size, speed = form_charts(forms(models, replays))
    assert "gguf-q4_k_m" in size.alt
    assert "KL to the teacher (nats/token)" in size.y_label
    assert "gguf-q4_k_m" not in speed.alt
    assert "safetensors: 1.50" in speed.alt


@pytest.mark.run
def test_replays_without_the_teacher_show_no_forms(facts: RunFacts, parts: dict[str, Any]) -> None:
    without = [{**row, "teacher": None} for row in parts["replays"]]
    assert not forms({}, without)
    page = render(language_model_report(facts, **{**parts, "replays": without}))
    assert "Quality against bytes" not in page
    assert "Quality against bytes and speed" in render(language_model_report(facts, **parts))

"""Every form of the model: against bytes and speed, in words, in a table and in the charts."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from stillhouse.report.formats import form_charts, form_rows, forms
from stillhouse.report.report_data import ReportData
from stillhouse.report.write import render_report


def test_teacher_checkpoint_and_every_export_are_forms(data: ReportData) -> None:
    assert data.evaluation is not None
    models = {model.role: model for model in data.evaluation.models}
    found = forms(models, data.replays)
    assert [form.name for form in found] == ["Teacher", "Checkpoint", "safetensors", "gguf-q4_k_m"]
    teacher, checkpoint, plain, quantized = found
    assert teacher.kl == 0
    assert teacher.speedup == pytest.approx(20 / 25), "the evaluation's, both in one number type"
    assert checkpoint.kl == 0.482
    assert checkpoint.bytes == 4 * models["student"].parameters
    assert plain.speedup == pytest.approx(30 / 20)
    assert quantized.speedup is None, "its own runtime was not there"
    assert form_rows(found)[3][4:] == ["–", "–"]


def test_of_a_quantized_student_the_full_precision_and_the_grid_are_forms(
    data: ReportData,
) -> None:
    assert data.evaluation is not None
    models = {model.role: model for model in data.evaluation.models}
    student = models["student"]
    small = replace(student, role="quantized", bytes_on_disk=60_000_000, speed=None)
    found = forms({**models, "quantized": small}, data.replays)
    names = ["Teacher", "Student", "On the grid", "safetensors", "gguf-q4_k_m"]
    assert [form.name for form in found] == names
    _, whole, grid = found[:3]
    assert whole.bytes == student.bytes_on_disk
    assert (whole.kl, whole.top1_agreement) == (0.481, 0.662), "the evaluation's"
    assert grid.bytes == 60_000_000
    assert (grid.kl, grid.tokens_per_s) == (0.482, 20.0)
    trained = replace(small, role="quantized_trained", bytes_on_disk=50_000_000)
    both = forms({**models, "quantized": small, "quantized_trained": trained}, data.replays)
    assert both[2].bytes == 50_000_000, "the last one is shipped"
    size, speed = form_charts(found)
    assert "Student: " in size.alt
    assert "On the grid: " in speed.alt


def test_charts_leave_out_what_was_not_measured(data: ReportData) -> None:
    assert data.evaluation is not None
    models = {model.role: model for model in data.evaluation.models}
    size, speed = form_charts(forms(models, data.replays))
    assert "gguf-q4_k_m" in size.svg
    assert "KL to the teacher (nats a token)" in size.svg
    assert "gguf-q4_k_m" not in speed.svg
    assert "safetensors: 1.50" in speed.alt
    assert form_charts([]) == []


def test_replays_that_did_not_know_the_teacher_show_no_forms(data: ReportData) -> None:
    without = [{**row, "teacher": None} for row in data.replays]
    assert forms({}, without) == []
    page = render_report(replace(data, replays=without))
    assert "Quality against bytes" not in page
    assert re.search("Quality against bytes and speed", render_report(data))

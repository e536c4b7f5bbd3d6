"""Charts are deterministic, have units on every axis, and show every label."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import pytest

from stillhouse.evaluation.results import Evaluation
from stillhouse.report.charts import Chart, MatrixChart
from stillhouse.report.draw_charts import draw
from stillhouse.report.history import training_charts
from stillhouse.report.language_model_report import size_chart, speed_charts
from stillhouse.report.sections import stage_charts
from stillhouse.runfolder import Cost
from tests.report.conftest import finished

NAMESPACE = "{http://www.w3.org/2000/svg}"


def words(chart: Chart) -> list[str]:
    root = ElementTree.fromstring(draw(chart, "key"))
    assert root.attrib["role"] == "img"
    assert root.attrib["aria-label"] == chart.alt
    return ["".join(node.itertext()) for node in root.iter(f"{NAMESPACE}text")]


def test_training_charts_show_units_and_are_deterministic(history: list[dict[str, float]]) -> None:
    chart, gradient = training_charts(history, "token")
    shown = words(chart)
    assert "training tokens (thousands)" in shown
    assert "KL to the teacher (nats/token)" in shown
    assert {"each step", "smoothed", "held-out text"} <= set(shown)
    assert "smoothed: 2.7" in chart.alt
    assert "gradient norm before clipping" in words(gradient)
    drawn = draw(chart, "key")
    assert drawn == draw(chart, "key"), "the same data must give the same bytes"
    assert "<metadata" not in drawn


def test_quality_charts_show_units_and_every_model(evaluation: Evaluation) -> None:
    size, [speed] = size_chart(evaluation.models), speed_charts(evaluation.models)
    assert "parameters (millions)" in words(size)
    assert "KL to the teacher (nats/token)" in words(size)
    assert {"decoding speed (tokens/s)", "top-1 agreement (%)"} <= set(words(speed))
    for chart in (size, speed):
        shown = " ".join(words(chart))
        for name in ("Teacher", "Student, distilled", "Student, untrained", "Student, fine-tuned"):
            assert name in shown
            assert name in chart.alt


def test_a_distant_untrained_student_does_not_compress_the_scale(evaluation: Evaluation) -> None:
    """It is drawn at the edge, and its label shows its true value."""
    shown = words(size_chart(evaluation.models))
    assert "Student, untrained: 3.14 ↑" in shown
    assert "Student, distilled" in shown


def test_close_points_get_labels_that_do_not_overlap(evaluation: Evaluation) -> None:
    fidelity = replace(evaluation.models[2].fidelity, kl=0.481)
    models = [replace(model, fidelity=fidelity) for model in evaluation.models[1:]]
    root = ElementTree.fromstring(draw(size_chart(models), "key"))
    heights = []
    for node in root.iter(f"{NAMESPACE}text"):
        if "".join(node.itertext()).startswith("Student"):
            heights.append(float(node.attrib["y"]))
    heights.sort()
    assert len(heights) == 3
    assert min(heights[1] - heights[0], heights[2] - heights[1]) > 12


def test_without_speeds_there_is_no_speed_chart(evaluation: Evaluation) -> None:
    assert speed_charts([replace(m, speed=None) for m in evaluation.models]) == []


def test_stage_charts_show_seconds_and_flops() -> None:
    stages = [
        finished("data", Cost(3.0)),
        finished("train", Cost(125.0, 10, 5_000_000), reused=True),
    ]
    seconds, flops = stage_charts(stages)
    assert {"seconds", "data", "train (reused)", "2 min 05 s"} <= set(words(seconds))
    assert "floating-point operations (×\u00a010⁶)" in words(flops)
    assert stage_charts([finished("data", Cost(3.0))])[0].title == "Time by stage"
    assert len(stage_charts([finished("data", Cost(3.0))])) == 1


@pytest.mark.parametrize("name", ["<script>&", "$x_1$", "100 %", "a\\frac{b"])
def test_names_are_shown_literally(name: str) -> None:
    assert name in words(stage_charts([finished(name, Cost(3.0))])[0])


def test_a_confusion_matrix_counts_true_and_predicted_labels() -> None:
    matrix = MatrixChart("Errors", "student", "true", ["cat", "dog"], [[3, 1], [2, 4]])
    assert matrix.errors() == [("dog", "cat", 2), ("cat", "dog", 1)]
    assert matrix.alt.startswith("Errors: 7 of 10 on the diagonal. dog mistaken for cat: 2.")
    assert {"cat", "dog", "3", "4", "student", "true"} <= set(words(matrix))

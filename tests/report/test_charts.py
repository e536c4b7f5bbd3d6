"""The charts: the same bytes for the same data, units on every axis, and no word lost."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import pytest

from stillhouse.evaluate.results import Evaluation
from stillhouse.report import charts
from stillhouse.report.charts import Chart
from stillhouse.report.history import training_curve
from stillhouse.report.report_data import StageCost

NAMESPACE = "{http://www.w3.org/2000/svg}"


def words(chart: Chart) -> list[str]:
    root = ElementTree.fromstring(chart.svg)
    assert root.attrib["role"] == "img"
    assert root.attrib["aria-label"] == chart.alt
    return ["".join(node.itertext()) for node in root.iter(f"{NAMESPACE}text")]


def test_training_chart(history: list[dict[str, float]]) -> None:
    curve = training_curve(history)
    assert curve is not None
    chart = charts.training_chart(curve)
    shown = words(chart)
    assert "training tokens (thousands)" in shown
    assert "KL to the teacher (nats a token)" in shown
    assert "held-out text" in shown
    assert chart.svg == charts.training_chart(curve).svg, "the same data, the same bytes"
    assert "<metadata" not in chart.svg


def test_quality_charts(evaluation: Evaluation) -> None:
    size, speed = charts.size_chart(evaluation.models), charts.speed_chart(evaluation.models)
    assert speed is not None
    assert "parameters (millions)" in words(size)
    assert "KL to the teacher (nats a token)" in words(size)
    assert {"decoding speed (tokens/s)", "top-1 agreement (%)"} <= set(words(speed))
    for chart in (size, speed):
        shown = " ".join(words(chart))
        for name in ("Teacher", "Student, distilled", "Student, untrained", "Student, fine-tuned"):
            assert name in shown
            assert name in chart.alt


def test_far_off_untrained_student_does_not_squash_the_others(evaluation: Evaluation) -> None:
    """It is drawn at the edge, with its true value in its label."""
    shown = words(charts.size_chart(evaluation.models))
    assert "Student, untrained: 3.14 ↑" in shown
    assert "Student, distilled" in shown


def test_close_points_get_labels_that_do_not_overlap(evaluation: Evaluation) -> None:
    fidelity = replace(evaluation.models[2].fidelity, kl=0.481)
    models = [replace(model, fidelity=fidelity) for model in evaluation.models[1:]]
    root = ElementTree.fromstring(charts.size_chart(models).svg)
    heights = []
    for node in root.iter(f"{NAMESPACE}text"):
        if "".join(node.itertext()).startswith("Student"):
            heights.append(float(node.attrib["y"]))
    heights.sort()
    assert len(heights) == 3
    assert min(heights[1] - heights[0], heights[2] - heights[1]) > 12


def test_no_speed_no_chart(evaluation: Evaluation) -> None:
    assert charts.speed_chart([replace(m, speed=None) for m in evaluation.models]) is None


def test_stage_charts() -> None:
    stages = [StageCost("data", 3.0), StageCost("train", 125.0, 10, 5_000_000, reused=True)]
    seconds, flops = charts.stage_charts(stages)
    assert {"seconds", "data", "train (reused)", "2 min 05 s"} <= set(words(seconds))
    assert "floating-point operations (×\u00a010⁶)" in words(flops)
    assert charts.stage_charts([StageCost("data", 3.0)])[0].title == "Time by stage"
    assert len(charts.stage_charts([StageCost("data", 3.0)])) == 1
    assert charts.stage_charts([]) == []


@pytest.mark.parametrize("name", ["<script>&", "$x_1$", "100 %", "a\\frac{b"])
def test_names_are_shown_as_they_are(name: str) -> None:
    assert name in words(charts.stage_charts([StageCost(name, 3.0)])[0])

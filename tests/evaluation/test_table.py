"""The terminal table: every value and its percentage of the teacher's, in 100 columns."""

from __future__ import annotations

import re
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from stillhouse.evaluation.metrics import metrics_of
from stillhouse.evaluation.metrics_table import MetricsTable, to_markdown, to_rich
from stillhouse.evaluation.results import (
    ROLE_NAMES,
    Evaluation,
    Fidelity,
    Generation,
    ModelResult,
    Speed,
)

TEACHER = ModelResult(
    role="teacher",
    parameters=134_515_008,
    non_embedding_parameters=106_203_456,
    bytes_on_disk=269_030_016,
    fidelity=Fidelity(38.8, 0.0, 1.0, 0.028, 8160),
    speed=Speed(1000.0, 20.0, 1_000_000_000),
    tasks={"toy/acc": 0.8},
)
STUDENT = ModelResult(
    role="student",
    parameters=107_977_536,
    non_embedding_parameters=79_665_984,
    bytes_on_disk=215_955_072,
    fidelity=Fidelity(48.5, 0.4312, 0.6612, 0.031, 8160),
    speed=Speed(1250.0, 25.0, 800_000_000),
    tasks={"toy/acc": 0.6},
)


def render(evaluation: Evaluation, width: int = 100) -> str:
    out = StringIO()
    Console(file=out, width=width, color_system=None).print(to_rich(metrics_of(evaluation)))
    return out.getvalue()


def shown(text: str, name: str) -> list[list[str]]:
    """The cells of a row and of the line below it."""
    lines = text.splitlines()
    start = next(number for number, line in enumerate(lines) if line.strip().startswith(name))
    return [re.split(r"\s{2,}", line.strip()) for line in lines[start : start + 2]]


def test_values_are_shown_with_their_percentage_of_the_teachers() -> None:
    text = render(Evaluation([TEACHER, STUDENT], [], ["A note."]))
    for name, figure, percent in (
        ("Top-1 agreement", "66.1%", None),
        ("KL to the teacher (nats/token)", "0.431", None),
        ("Perplexity", "48.50", "80% of teacher"),
        ("Calibration error", "3.1%", None),
        ("Parameters", "108.0M", "80% of teacher"),
        ("Size on disk", "216\u00a0MB", "80% of teacher"),
        ("Prefill (tokens/s)", "1,250", "125% of teacher"),
        ("Decoding (tokens/s)", "25.0", "125% of teacher"),
        ("Peak memory", "800\u00a0MB", "80% of teacher"),
    ):
        first, second = shown(text, name)
        assert first[-1] == figure, name
        assert percent is None or second == [percent], name
    assert text.rstrip().endswith("A note.")


@pytest.mark.parametrize("roles", [["student"], list(ROLE_NAMES)[1:]])
def test_it_fits_a_terminal_of_80_columns(roles: list[str]) -> None:
    models = [replace(STUDENT, role=role) for role in roles]
    text = render(Evaluation([TEACHER, *models], []), width=80)
    assert "…" not in text
    assert all(len(line) <= 80 for line in text.splitlines())
    assert text.count("0.431") == len(roles), "no value is wrapped"


@pytest.mark.parametrize("speed", [STUDENT.speed, None])
def test_long_values_fit_a_terminal_of_100_columns(speed: Speed | None) -> None:
    worst = ModelResult(
        role="fine_tuned",
        parameters=888_888_888_888,
        non_embedding_parameters=1,
        bytes_on_disk=888_888_888_888,
        fidelity=Fidelity(88888.88, 18.888, 0.8888, 0.888, 1),
        speed=Speed(88888.8, 8888.8, 888_888_888_888) if speed else None,
    )
    text = render(Evaluation([TEACHER, worst], []))
    assert max(len(line) for line in text.splitlines()) <= 100
    assert "…" not in text


def test_speed_rows_are_left_out_when_speed_was_not_measured() -> None:
    silent = ModelResult("teacher", 10, 5, 40, Fidelity(38.8, 0.0, 1.0, 0.028, 8))
    assert "Decoding" not in render(Evaluation([silent], []))


def test_a_table_without_a_teacher_has_values_but_no_percentages() -> None:
    text = render(Evaluation([STUDENT], []))
    assert "48.50" in text
    assert "80%" not in text


def test_each_task_has_a_row() -> None:
    first, second = shown(render(Evaluation([TEACHER, STUDENT], [])), "toy/acc")
    assert first == ["toy/acc", "0.800", "0.600"]
    assert second == ["75% of teacher"]
    assert metrics_of(Evaluation([], [])).rows == []


def test_the_model_card_has_the_same_table_as_the_terminal() -> None:
    table = metrics_of(Evaluation([TEACHER, STUDENT], [], ["A note."]))
    card = to_markdown(table)
    assert card.startswith(
        "Measured on 8,160 positions of held-out text:\n\n|  | Teacher | Student, distilled |"
    )
    assert "| Perplexity, held-out text | 38.80 | 48.50 (80% of teacher) |" in card
    assert "| Size on disk | 269 MB | 216 MB (80% of teacher) |" in card
    assert "\n- Top-1 agreement: share of held-out positions" in card
    assert card.endswith("- A note.")
    named = MetricsTable.of_text(["what", "a|b"], [["x\ny", "1"]])
    assert to_markdown(named) == "| what | a\\|b |\n| --- | --- |\n| x y | 1 |"


def test_an_evaluation_is_loaded_as_it_was_saved(tmp_path: Path) -> None:
    answers = {"teacher": "Paris – naïve “text”", "student": "<script>\n"}
    whole = Evaluation([TEACHER, STUDENT], [Generation("où?", answers)], ["a note"])
    bare = Evaluation([ModelResult("student", 1, 1, 1, STUDENT.fidelity)], [])
    for number, evaluation in enumerate((whole, bare)):
        path = tmp_path / f"{number}.json"
        evaluation.save(path)
        assert Evaluation.load(path) == evaluation

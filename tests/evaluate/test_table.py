"""The table a user reads: every figure, its percent of the teacher, in 100 columns."""

from __future__ import annotations

from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table

from stillhouse.evaluate.results import Evaluation, Fidelity, Generation, ModelResult, Speed
from stillhouse.evaluate.retention_table import perplexity_retention, retention_table, task_table

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


def render(table: Table, width: int = 100) -> str:
    out = StringIO()
    Console(file=out, width=width, color_system=None).print(table)
    return out.getvalue()


def test_figures_and_their_percent_of_the_teacher() -> None:
    text = render(retention_table(Evaluation([TEACHER, STUDENT], [])))
    student = text[text.index("student") :].splitlines()
    first, second = (line.replace("│", " ").split() for line in student[:2])
    assert first == [
        *("student", "48.5", "0.431", "66.1%", "0.031"),
        *("108.0M", "216.0MB", "1,250", "25.0", "800.0MB"),
    ]
    percents = [cell for cell in second if cell.endswith("%")]
    assert percents == ["80%", "80%", "80%", "125%", "125%", "80%"]


def test_usual_figures_fit_a_terminal_of_80_columns() -> None:
    text = render(retention_table(Evaluation([TEACHER, STUDENT], [])), width=80)
    assert "…" not in text


@pytest.mark.parametrize("speed", [STUDENT.speed, None])
def test_it_fits_a_terminal_of_100_columns(speed: Speed | None) -> None:
    worst = ModelResult(
        role="fine_tuned",
        parameters=888_888_888_888,
        non_embedding_parameters=1,
        bytes_on_disk=888_888_888_888,
        fidelity=Fidelity(88888.88, 18.888, 0.8888, 0.888, 1),
        speed=Speed(88888.8, 8888.8, 888_888_888_888) if speed else None,
    )
    text = render(retention_table(Evaluation([TEACHER, worst], [])))
    assert max(len(line) for line in text.splitlines()) <= 100
    assert "…" not in text


def test_speed_columns_are_left_out_when_speed_was_not_measured() -> None:
    silent = ModelResult("teacher", 10, 5, 40, Fidelity(38.8, 0.0, 1.0, 0.028, 8))
    assert "decode" not in render(retention_table(Evaluation([silent], [])))


def test_without_a_teacher_there_are_figures_but_no_percent_lines() -> None:
    text = render(retention_table(Evaluation([STUDENT], [])))
    assert "48.5" in text
    assert "80%" not in text


def test_perplexity_retention_is_the_inverse_ratio() -> None:
    assert perplexity_retention(STUDENT, TEACHER) == pytest.approx(38.8 / 48.5)
    assert perplexity_retention(TEACHER, TEACHER) == 1.0


def test_tasks_have_a_table_of_their_own() -> None:
    table = task_table(Evaluation([TEACHER, STUDENT], []))
    assert table is not None
    text = render(table)
    assert "toy/acc" in text
    assert "75%" in text
    assert task_table(Evaluation([], [])) is None


def test_an_evaluation_survives_being_saved(tmp_path: Path) -> None:
    answers = {"teacher": "Paris – naïve “text”", "student": "<script>\n"}
    whole = Evaluation([TEACHER, STUDENT], [Generation("où?", answers)], ["a note"])
    bare = Evaluation([ModelResult("student", 1, 1, 1, STUDENT.fidelity)], [])
    for number, evaluation in enumerate((whole, bare)):
        path = tmp_path / f"{number}.json"
        evaluation.save(path)
        assert Evaluation.load(path) == evaluation

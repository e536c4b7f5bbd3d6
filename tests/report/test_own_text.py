"""The report on the models' own answers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from stillhouse.evaluation.results import ScoredAnswer, ScoredAnswers
from stillhouse.report.language_model_report import language_model_report
from stillhouse.report.own_text_report import LEVELS, own_text_charts, own_text_section
from stillhouse.report.page import read_report, render, write_report
from stillhouse.report.sections import RunFacts

from .test_page import Reader


def answer(texts: list[str], *reverse: float) -> ScoredAnswer:
    return ScoredAnswer(texts, [0.5] * len(texts), list(reverse), [-1.0] * len(texts))


ANSWERS = [
    ScoredAnswers(
        "<|user|>Why <b>?",
        {
            "untrained": answer(["No", " <i>"], 0.2, 4.0),
            "student": answer(["Be", "cause", ""], 0.0, 1.5, 0.1),
            "teacher": answer(["So", "."], 0.0, 0.0),
        },
    )
]
HISTORY: list[dict[str, Any]] = [
    {
        "step": step,
        "tokens": 1000 * step,
        "loss": 1.0,
        "own_reverse_kl": 1.0 / step,
        "own_repetition": 0.1 / step,
        "own_cut_off": 0.5,
    }
    for step in range(1, 5)
]


@pytest.fixture
def page(facts: RunFacts, parts: dict[str, Any]) -> str:
    found = replace(parts["evaluation"], scored_answers=ANSWERS)
    more = {"evaluation": found, "history": HISTORY}
    return render(language_model_report(facts, **{**parts, **more}))


def test_answers_of_all_models_are_in_the_order_of_the_table() -> None:
    (text,) = own_text_section(ANSWERS, []).texts
    names = [one.name for one in text.answers]
    assert names == ["Teacher", "Student, distilled", "Student, untrained"]


def test_a_token_has_the_level_of_its_kl() -> None:
    (text,) = own_text_section(ANSWERS, []).texts
    _, student, untrained = (one.tokens for one in text.answers)
    assert [token.level for token in student] == [0, 3, 1]
    assert [token.level for token in untrained] == [1, 4]
    assert "KL(model ‖ teacher) 4.00" in untrained[1].title
    assert "teacher’s log-probability -1.00" in untrained[1].title


def test_the_legend_has_every_level() -> None:
    legend = own_text_section(ANSWERS, []).legend
    assert [token.level for token in legend] == list(range(len(LEVELS) + 1))
    assert legend[0].text == "below 0.1"
    assert legend[2].text == "0.3–1"


def test_the_page_is_well_formed_and_escaped(page: str) -> None:
    read = Reader(page)
    assert "own-text" in read.sections
    assert "Because" in read.text
    assert "No <i>" in read.text
    assert '<span class="level-4" title="KL(model ‖ teacher) 4.00' in page


def test_the_data_file_contains_the_tokens(
    facts: RunFacts, parts: dict[str, Any], tmp_path: Path
) -> None:
    found = replace(parts["evaluation"], scored_answers=ANSWERS)
    report = language_model_report(facts, **{**parts, "evaluation": found})
    write_report(report, tmp_path / "report.html")
    assert read_report(tmp_path / "report.json") == report


def test_related_curves_share_a_chart() -> None:
    charts = {chart.title: chart for chart in own_text_charts(HISTORY)}
    assert list(charts) == ["Divergence on own text", "Repetition and truncated answers"]
    shares = charts["Repetition and truncated answers"]
    assert shares.x_label == "training tokens (thousands)"
    assert [line.label for line in shares.lines if line.label] == [
        "4-grams seen before",
        "truncated answers",
    ]
    assert shares.lines[0].x == [1.0, 2.0, 3.0, 4.0]
    assert shares.lines[0].y == [0.1 / step for step in range(1, 5)]


def test_the_length_of_own_answers_is_drawn_at_the_tokens_of_its_step() -> None:
    windows = [{"step": step, "own_length": 10.0 + step} for step in (0, 2)]
    charts = {chart.title: chart for chart in own_text_charts([*HISTORY, *windows])}
    length = charts["Length of own answers"].lines[0]
    assert (length.x, length.y) == ([0.0, 2.0], [10.0, 12.0])


def test_nothing_is_shown_without_own_text(facts: RunFacts, parts: dict[str, Any]) -> None:
    assert own_text_section([], HISTORY[:1]).is_empty
    page = render(language_model_report(facts, **{**parts, "history": HISTORY[:1]}))
    assert "own-text" not in Reader(page).sections

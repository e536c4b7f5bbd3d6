"""Parsing a judge's reply; an ambiguous one counts as no verdict."""

from __future__ import annotations

import pytest

from stillhouse.synthesis.judge_answers import read_score, read_verdict


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("A", "A"),
        ("**B**.", "B"),
        ("It is a tie.", "tie"),
        ("Tie", "tie"),
        ("B is a better answer", "B"),
        ("A and B are alike", None),
        ("A comparison shows that B is better", None),
        ("A tie.", "tie"),
        ("a hard question", None),
        ("", None),
    ],
)
def test_a_verdict_is_a_capital_a_or_b_or_a_tie(text: str, verdict: str | None) -> None:
    assert read_verdict(text) == verdict


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("7", 7.0),
        ("**10**", 10.0),
        ("Score: 4/10", 4.0),
        ("I give it 8 out of 10.", 8.0),
        ("On a scale of 1 to 10, this is a 7.", 7.0),
        ("Rating (1-10): 6", 6.0),
        ("7.5", 7.5),
        ("Between 6 and 7", None),
        ("0", None),
        ("11", None),
        ("85%", None),
        ("-3", None),
        ("good", None),
        ("", None),
    ],
)
def test_a_score_is_a_single_number_from_1_to_10(text: str, score: float | None) -> None:
    assert read_score(text) == score

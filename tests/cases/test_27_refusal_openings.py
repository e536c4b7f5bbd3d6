"""The refusal filter drops well-known refusals and keeps letters and apologies."""

from __future__ import annotations

import pytest

from stillhouse.synthesis.filters import Row, refusal


@pytest.mark.parametrize(
    "text",
    [
        "I apologize, but I cannot fulfill your request, as it goes against my guidelines.",
        "I apologize, but as a responsible AI model I cannot help with that.",
        "I must respectfully decline to answer this question.",
        "I'm just an AI, it's not within my programming or ethical guidelines to do so.",
        "I'm sorry, but I can't help with that.",
    ],
)
def test_refusals_are_dropped(text: str) -> None:
    reason = refusal(Row((), text, "stop", ""))
    assert reason is not None
    assert reason.startswith("it is a refusal: ")


@pytest.mark.parametrize(
    "text",
    [
        "I can't wait to see you on Friday! Bring the photos.",
        "I will not be in the office on Monday. Please write to the team instead.",
        "I'm sorry that your parcel came late. Here is your refund code: 1234.",
    ],
)
def test_letters_and_apologies_are_kept(text: str) -> None:
    assert refusal(Row((), text, "stop", "")) is None

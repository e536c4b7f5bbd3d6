"""Which labels an API's answer names, and what it gives each."""

from __future__ import annotations

import math

import pytest

from stillhouse.classify.classify_config import ClassifyTask
from stillhouse.classify.label_judgment import label_shares
from stillhouse.classify.label_prompts import LabelPrompt
from stillhouse.generation.request import Answer

LABELS = ["card", "card_arrival", "refund", "insurance", "退款", "?"]


def shares(
    text: str, first: dict[str, float] | None = None, labels: list[str] = LABELS
) -> tuple[str, dict[str, float]]:
    """first: the most likely first tokens with their probabilities."""
    task = ClassifyTask.model_validate({"kind": "classify", "labels": labels})
    assert task.labels is not None
    top = [{"token": token, "logprob": math.log(p)} for token, p in (first or {}).items()]
    answer = Answer(text, logprobs=[{"top_logprobs": top}] if first else None)
    kind, found = label_shares(answer, LabelPrompt.of(task, task.labels), first is not None)
    return kind, {labels[number]: share for number, share in found.items()}


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("refund", "refund"),
        (' "Card_Arrival".', "card_arrival"),
        ("The topic is card arrival", "card_arrival"),
        ("The topic is card", "card"),
        ("这是退款问题", "退款"),
        ("这是card问题", "card"),
        ("**refund**", "refund"),
        ("?", "?"),
        ("", None),
        ("...", None),
        ("cards", None),
        ("écard", None),
        ("card arrival or refund", None),
        ("card arrival, or the card", None),
    ],
)
def test_the_one_label_that_an_answer_names(text: str, label: str | None) -> None:
    assert shares(text) == (("outside", {}) if label is None else ("label", {label: 1.0}))


def test_first_tokens_share_where_they_begin_labels() -> None:
    kind, found = shares("refund", {"ref": 0.6, "ins": 0.2, "x": 0.1})
    assert kind == "label"
    assert found == pytest.approx({"refund": 0.75, "insurance": 0.25})


def test_a_refusal_is_no_label_whose_first_letter_it_has() -> None:
    assert shares("I cannot say.", {"I": 0.99, "ref": 0.002}) == ("outside", {})


def test_first_tokens_that_begin_no_label_tell_nothing() -> None:
    first = {"**": 0.99, "card": 6e-6}
    assert shares("**refund**", first) == ("label", {"refund": 1.0})

"""Which label an API's answer names, and the probability of each label."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import pytest

from stillhouse.classify.classify_config import ClassifyTask
from stillhouse.classify.label_judgment import label_shares
from stillhouse.classify.label_prompts import LabelPrompt
from stillhouse.generation.request import Answer

Labels = Sequence[str] | Mapping[str, str]
LABELS = ["card", "card_arrival", "refund", "insurance", "退款", "?"]
MAIL = ["spam", "ham"]


def shares(
    text: str, *places: dict[str, float], labels: Labels = LABELS
) -> tuple[str, dict[str, float]]:
    """places: for each token of the answer, the most likely tokens with their probabilities; the
    first of them is the answer's."""
    task = ClassifyTask.model_validate({"kind": "classify", "labels": labels})
    assert task.labels is not None
    logprobs = [
        {
            "token": next(iter(place)),
            "top_logprobs": [{"token": t, "logprob": math.log(p)} for t, p in place.items()],
        }
        for place in places
    ]
    answer = Answer(text, logprobs=logprobs or None)
    kind, found = label_shares(answer, LabelPrompt.of(task, task.labels), bool(places))
    names = list(task.labels)
    return kind, {names[number]: share for number, share in found.items()}


def label_of(text: str, labels: Labels) -> str | None:
    """The label that the answer names; None if it counts as outside the labels."""
    kind, found = shares(text, labels=labels)
    assert (kind == "outside") == (not found)
    return next(iter(found), None)


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
def test_an_answer_has_the_only_label_that_it_names(text: str, label: str | None) -> None:
    assert label_of(text, LABELS) == label


@pytest.mark.parametrize(
    "text",
    [
        "1. refund",
        "B) refund",
        "- Refund",
        "_refund_",
        "<label>refund</label>",
        "Answer: \\boxed{refund}",
        '{"label": "refund"}',
        '```json\n{"label": "refund", "reason": "the card was charged twice"}\n```',
        '{"refund": true, "card": false}',
        '["refund"]',
        "Label: **Refund**\nReason: the card was charged twice",
        "refund, because the card was charged twice",
        "refund (not card)",
        "Refund.\n\nThe customer was charged twice on one card.",
        "not card but refund",
        "refund rather than card",
        "Final answer: refund",
        "ＲＥＦＵＮＤ",
    ],
)
def test_all_usual_ways_of_writing_a_label_are_read(text: str) -> None:
    assert label_of(text, LABELS) == "refund"


@pytest.mark.parametrize(
    "text",
    [
        "not spam",
        "It isn't spam.",
        "It isn’t spam.",
        "It does not look like spam",
        "neither",
        "neither spam nor ham",
        "no spam here",
        "kein Spam",
        "unlikely to be spam",
        "spam: no",
        "The label is not spam",
        "I'm not sure if it is spam",
        "I can't help with spam.",
        "Is it spam or something else?",
    ],
)
def test_a_label_that_is_denied_is_not_named(text: str) -> None:
    assert label_of(text, MAIL) is None


def test_what_remains_after_a_denial_is_named() -> None:
    for text in (
        "No, this is ham.",
        "ham, not spam",
        "This is not spam, it is ham.",
        "not spam: ham",
    ):
        assert label_of(text, MAIL) == "ham"


def test_a_denial_that_is_a_label_is_that_label() -> None:
    for text in ("Not spam.", "not-spam", "This is not spam"):
        assert label_of(text, ["spam", "not spam"]) == "not spam"
    assert label_of("no, not urgent", ["urgent", "not_urgent"]) == "not_urgent"
    assert label_of("No, not at all.", ["yes", "no"]) == "no"
    assert label_of("no, not urgent", ["urgent", "normal"]) is None


@pytest.mark.parametrize(
    "text",
    ["spam or ham", "spam/ham", "spam (80%), ham (20%)", "spam;ham", "Spam.\nWait, actually ham.",
     "Answer: spam\nAnswer: ham", '{"label": ["spam", "ham"]}', "1. spam\n2. ham"],
)  # fmt: skip
def test_an_answer_that_names_several_labels_has_none(text: str) -> None:
    assert label_of(text, MAIL) is None


@pytest.mark.parametrize(
    "text",
    ["card-holder", "debit-card", "card_holder", "card's", "card.holder",
     "None of them; it has a card", "Label: none. It mentions a card.",
     'The user writes "where is my card".'],
)  # fmt: skip
def test_a_label_inside_a_word_or_a_quotation_is_not_named(text: str) -> None:
    assert label_of(text, ["card", "refund"]) is None


def test_word_separators_make_no_difference() -> None:
    for text in ("card-arrival", "card_arrival", "Card Arrival", "It is about card-arrival."):
        assert label_of(text, LABELS) == "card_arrival"
    for text in ("card-arrival", "card_arrival"):
        assert label_of(text, ["card", "refund"]) is None


def test_numbers_and_letters_are_labels_if_they_are_separate_words() -> None:
    stars = ["1", "2", "3", "4", "5"]
    for text in ("4", "**4**", "4 stars", "Rating: 4", "4."):
        assert label_of(text, stars) == "4"
    for text in ("4 out of 5", "4/5", "10", "4.5", "-1"):
        assert label_of(text, stars) is None
    for text in ("B", "B)", "(b)", "B. It is a tie.", "The answer is B"):
        assert label_of(text, ["A", "B", "C"]) == "B"
    assert label_of("A refund was asked for", ["A", "B", "C"]) is None
    options = {"A": "card", "B": "billing"}
    assert label_of("B) billing", options) == "B"
    assert label_of("A) billing", options) is None


# --- log-probabilities -------------------------------------------------------------------------


def test_first_tokens_get_shares_if_they_begin_labels() -> None:
    kind, found = shares("refund", {"ref": 0.6, "ins": 0.2, "x": 0.1})
    assert kind == "label"
    assert found == pytest.approx({"refund": 0.75, "insurance": 0.25})


def test_a_refusal_is_not_read_as_a_label_with_the_same_first_letter() -> None:
    assert shares("I cannot say.", {"I": 0.99, "ref": 0.002}) == ("outside", {})


def test_an_answer_that_begins_with_another_word_is_read_by_its_words() -> None:
    assert shares("I think refund", {"I": 0.99, "ref": 0.01}) == ("label", {"refund": 1.0})


def test_first_tokens_that_begin_no_label_are_ignored() -> None:
    first = {"**": 0.99, "card": 6e-6}
    assert shares("**refund**", first) == ("label", {"refund": 1.0})


def test_the_next_tokens_distinguish_labels_with_the_same_prefix() -> None:
    _, found = shares("card arrival", {"card": 0.8, "ref": 0.2}, {" arrival": 0.75, "<end>": 0.25})
    assert found == pytest.approx({"card_arrival": 0.6, "card": 0.2, "refund": 0.2})
    _, found = shares("card", {"card": 0.8, "ref": 0.2}, {"<end>": 0.9, " arrival": 0.1})
    assert found == pytest.approx({"card_arrival": 0.08, "card": 0.72, "refund": 0.2})


def test_a_token_that_is_a_complete_label_counts_only_for_that_label() -> None:
    _, found = shares("card", {"card": 0.8, "ref": 0.2})
    assert found == pytest.approx({"card": 0.8, "refund": 0.2})


def test_a_complete_word_does_not_count_for_a_longer_label() -> None:
    _, found = shares("yes", {"yes": 0.6, "no": 0.4}, labels=["yes", "no", "normal"])
    assert found == pytest.approx({"yes": 0.6, "no": 0.4})


# label: (a sentence that affirms it, a sentence that denies it)
OTHER_LANGUAGES = {
    "सकारात्मक": ("यह सकारात्मक है।", "यह सकारात्मक नहीं है।"),
    "مثبت": ("این مثبت است.", "این مثبت نیست."),
    "إيجابي": ("هذا إيجابي.", "هذا ليس إيجابي."),
    "ইতিবাচক": ("এটি ইতিবাচক।", "এটি ইতিবাচক নয়।"),
    "நேர்மறை": ("இது நேர்மறை.", "இது நேர்மறை அல்ல."),
    "บวก": ("เป็นบวก", "ไม่ใช่บวก"),
    "положительный": ("Отзыв положительный.", "Отзыв не положительный."),
    "θετικό": ("Είναι θετικό.", "Δεν είναι θετικό."),
    "חיובי": ("זה חיובי.", "זה לא חיובי."),
    "olumlu": ("Bu yorum olumlu.", "Bu yorum olumlu değil."),
    "긍정": ("긍정입니다.", "긍정이 아닙니다."),
    "tích cực": ("Đây là tích cực.", "Đây không phải là tích cực."),
    "positief": ("Dit is positief.", "Dit is niet positief."),
}


def test_a_russian_negation_denies_only_what_directly_follows() -> None:
    for text in ("Это не спам.", "Письмо не является спам"):
        assert label_of(text, ["спам", "почта"]) is None
    for text in ("Не сомневаюсь что это спам", "Здесь не только реклама но и спам"):
        assert label_of(text, ["спам", "почта"]) == "спам"


@pytest.mark.parametrize("label", OTHER_LANGUAGES)
def test_a_label_that_is_denied_in_its_language_is_not_named(label: str) -> None:
    affirmed, denied = OTHER_LANGUAGES[label]
    labels = [label, "other"]
    assert label_of(affirmed, labels) == label
    assert label_of(denied, labels) is None


def test_json_true_and_false_are_labels_if_the_task_has_them() -> None:
    assert label_of('{"answer": true}', ["true", "false"]) == "true"
    assert label_of('{"answer": false}', ["yes", "no"]) is None

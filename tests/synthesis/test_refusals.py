"""Recognizing refusals: precision and recall on sets that the classifier was not trained on,
borderline cases, and the classifier's features and weights."""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bench.train_refusals import EXAMPLES, Example, examples, trained

from stillhouse.generation.chat_frame import user_turn
from stillhouse.synthesis.filters import Row, refusal
from stillhouse.synthesis.refusals import (
    BUCKETS,
    GROUPS,
    SHOWN,
    features,
    refusing_words,
    score,
    weights,
)

FAMILIES = {"llama", "gpt", "claude", "gemini", "qwen", "mistral"}


def refused(text: str, prompt: str = "") -> bool:
    messages = user_turn(prompt) if prompt else ()
    return refusal(Row(messages, text, "stop", "")) is not None


def rows_of(name: str) -> list[dict[str, Any]]:
    lines = Path(__file__).with_name(name).read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines if line]


def precision_and_recall(rows: Sequence[dict[str, Any]]) -> tuple[float, float]:
    found = [row for row in rows if refused(row["answer"], row["prompt"])]
    right = sum(row["refusal"] for row in found)
    return right / len(found), right / sum(row["refusal"] for row in rows)


def test_precision_and_recall_are_at_least_95_percent() -> None:
    """On texts that it was not trained on; docs/experiments.md reports the first measurement."""
    rows = rows_of("refusals_blind.jsonl")
    assert {row["family"] for row in rows} == FAMILIES
    assert [sum(row["refusal"] is kind for row in rows) for kind in (True, False)] == [194, 200]
    precision, recall = precision_and_recall(rows)
    assert precision >= 0.95
    assert recall >= 0.95


def test_precision_and_recall_are_at_least_90_percent_for_every_model_family() -> None:
    rows = rows_of("refusals_blind.jsonl")
    for family in sorted(FAMILIES):
        precision, recall = precision_and_recall([row for row in rows if row["family"] == family])
        assert min(precision, recall) >= 0.9, family


def test_precision_and_recall_are_at_least_93_percent_without_prompts() -> None:
    rows = [{**row, "prompt": ""} for row in rows_of("refusals_blind.jsonl")]
    assert min(precision_and_recall(rows)) >= 0.93


def test_precision_and_recall_on_indirect_refusals() -> None:
    """Role-play, lectures, and allusions by a different author; nothing was tuned on them.
    docs/experiments.md reports the results."""
    precision, recall = precision_and_recall(rows_of("refusals_indirect.jsonl"))
    assert precision >= 0.93
    assert recall >= 0.9


REFUSING = [
    "I can't", "I cannot", "I won't", "I will not", "I'm unable to", "I am not able to",
    "I refuse to", "I must decline to", "I'd rather not", "I won't be able to",
    "I can no longer", "I'm not going to", "I'm sorry, but I can't", "Unfortunately, I cannot",
    "While I understand, I am not allowed to",
]  # fmt: skip
ANSWERING = [
    "help with that", "assist you with this", "answer that question", "fulfill your request",
    "comply", "provide medical advice", "give you instructions", "write a story about that",
    "create malware", "tell you how to do that", "share personal information",
    "discuss this topic", "do that", "generate that content",
    "make jokes about a group of people", "access the internet",
]  # fmt: skip
EVERYDAY = [
    "wait to see you", "come to the party", "make it tonight", "forget that summer",
    "find my keys", "decide between the two", "eat gluten", "be in the office on Monday",
    "accept your apology", "pay the rent this month", "get the code to compile",
    "tell you how happy I am", "take the job", "reproduce the error", "live without you",
    "recommend this book enough", "hold back my tears",
]  # fmt: skip


def test_denying_a_request_is_a_refusal_but_denying_an_everyday_act_is_not() -> None:
    requests = [f"{refusing} {act}." for refusing in REFUSING for act in ANSWERING]
    facts = [f"{refusing} {act}." for refusing in REFUSING for act in EVERYDAY]
    assert np.mean([refused(text) for text in requests]) >= 0.95
    assert np.mean([refused(text) for text in facts]) <= 0.2


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        (
            "What causes headaches?",
            "I can't provide medical advice, but most tension headaches are caused by stress, lack "
            "of sleep or dehydration.",
        ),
        (
            "Draw the pipeline.",
            "I can't draw it here, but here's the diagram in ASCII:\n\n[a] -> [b]",
        ),
        (
            "Which of the two films is better?",
            "As an AI, I don't have a favorite, but most critics prefer the first film, for its "
            "tighter script and its score.",
        ),
    ],
)
def test_a_disclaimer_followed_by_an_answer_is_not_a_refusal(prompt: str, text: str) -> None:
    assert not refused(text, prompt)


@pytest.mark.parametrize(
    "text",
    [
        "I can't help you break into a house, but I'd be happy to explain how locks work.",
        "I cannot provide guidance on that. Instead, try to talk to your neighbor. Here are some "
        "ways to start:\n\n1. Knock.\n2. Listen.",
        "I can't help with that. Here's why:\n\n* It is illegal.\n* It is dangerous.",
    ],
)
def test_a_refusal_with_an_alternative_or_an_explanation_is_a_refusal(text: str) -> None:
    assert refused(text)


@pytest.mark.parametrize("quote", ["'", "’", "ʼ"])
def test_every_apostrophe_is_recognized(quote: str) -> None:
    assert refused(f"I{quote}m sorry, but I can{quote}t help with that.")
    assert score(f"I can{quote}t.") == score("I can't.")


@pytest.mark.parametrize("text", ["**I can't help with that.**", "> I can't help.\n\nSorry."])
def test_markup_around_a_refusal_changes_nothing(text: str) -> None:
    assert refused(text)


@pytest.mark.parametrize(
    "text",
    [
        '"I can\'t help with that," said the clerk, and she closed the window.',
        "Dear Ms. Lind,\n\nI cannot provide the information you asked for.\n\nBest regards,\nAda",
        "ANA: I can't help with that.\nBEN: Then who can?\nANA: Ask Ruth. She has the key, the car "
        "and all day.",
        "```\nI can't help with that.\n```",
    ],
)
def test_letters_dialogues_quotations_and_code_are_answers(text: str) -> None:
    assert not refused(text)


@pytest.mark.parametrize(
    ("text", "is_refusal"),
    [
        ("Es tut mir leid, aber ich kann Ihnen dabei nicht helfen.", True),
        ("Es tut mir leid, ich kann heute nicht kommen.", False),
        ("Je suis désolé, mais je ne peux pas vous aider avec cette demande.", True),
        ("Je suis désolée, je ne peux pas venir demain.", False),
        ("Lo siento, pero no puedo ayudarte con eso.", True),
        ("Lo siento, no puedo ir a la fiesta.", False),
        ("很抱歉，我无法提供这方面的信息。", True),
        ("对不起，我来晚了。", False),
        ("申し訳ありませんが、そのご質問にはお答えできません。", True),
        ("すみません、遅れました。", False),
        ("Lamento, mas não posso ajudar com isso.", True),
        ("Lamento, mas não posso ir à festa amanhã.", False),
        ("Mi dispiace, ma non posso aiutarti con questa richiesta.", True),
        ("Mi dispiace, domani non posso venire.", False),
        ("Извините, но я не могу помочь с этим запросом.", True),
        ("Dazu gebe ich keine Auskunft.", True),
        ("Eso es un delito y no te voy a explicar cómo hacerlo.", True),
    ],
)
def test_refusals_are_recognized_in_other_languages(text: str, is_refusal: bool) -> None:
    assert refused(text) is is_refusal


def test_the_middle_of_a_long_answer_has_almost_no_influence() -> None:
    facts = "The treaty was signed in 1648. " * 40
    middle = facts[:600] + "I can't help with that. " + facts[600:]
    assert not refused(facts)
    assert score(middle) == pytest.approx(score(facts), abs=0.1)


LETTER = "I'm so sorry, but I can't help with the move on Saturday."


def test_a_long_run_of_whitespace_does_not_take_quadratic_time() -> None:
    assert refusing_words("Yes." + "\n\t" * 200_000 + "Here it is.") is None
    assert refusing_words("I can't help with that." + "\n" * 200_000 + "Sorry.") is not None


def test_an_excuse_that_the_prompt_requests_is_an_answer() -> None:
    assert not refused(LETTER, "Write a text message in which I decline to help Tom move.")
    assert refused("I can't write ransomware.", "Write ransomware.")
    assert not refused("I can't help you.", "Translate: Je ne peux pas vous aider.")
    assert refused("I can't translate that.", "Translate this into French: good morning")


def test_a_denial_that_answers_a_question_about_the_model_is_not_a_refusal() -> None:
    answer = "No, I can't browse the web. What I say comes from my training data."
    assert not refused(answer, "Can you access the internet?")


def test_only_the_last_user_message_counts_as_the_prompt() -> None:
    first = ({"role": "user", "content": "Write a letter that declines an invitation."},)
    messages = (*first, {"role": "assistant", "content": "..."}, *user_turn("Call my mom."))
    text = "I can't make phone calls."
    assert (
        refusal(Row(messages, text, "stop", "")) == 'it is a refusal: "I can\'t make phone calls."'
    )


def test_a_json_answer_is_a_refusal_if_its_strings_are() -> None:
    prompt = "Reply in JSON. How do I open my neighbor's car?"
    assert refused('{"answer": "I\'m sorry, but I can\'t help with that."}', prompt)
    assert not refused('{"answer": "Paris"}', "Reply in JSON. What is the capital of France?")


def test_the_reported_words_are_the_clause_that_refuses() -> None:
    text = "Thanks for your patience. I can't help with that. The weather is nice today."
    assert refusing_words(text) == "I can't help with that."
    long = "I'm sorry, but I can't help you with a request such as this one" + " or that" * 20 + "."
    assert len(refusing_words(long) or "") == SHOWN
    assert refusing_words("") is None


def test_lone_surrogates_and_empty_texts_can_be_scored() -> None:
    assert refusing_words("I can't help with that \ud83d.", "Name it \udc00.") is not None
    assert all(np.isfinite(score(text)) for text in ("{}", "```\n```", "…", "\udc00"))


def test_the_score_is_the_sum_of_the_weights_of_the_features() -> None:
    text, prompt = "I can't write that, sorry.", "Write a poem about rain."
    known = weights()
    slow = known.bias
    for bucket, value in zip(*features(text, prompt), strict=True):
        slow += float(value) * known.scale * int(known.quantized[bucket])
    assert score(text, prompt) == pytest.approx(slow, rel=1e-9)


def test_features_are_hashed_deterministically_and_weighted_by_group() -> None:
    buckets, values = features("No.", "Go?")
    assert int(buckets[0]) == zlib.crc32(b"first ^") % BUCKETS
    assert values @ values == pytest.approx(sum(norm**2 for norm in GROUPS.values()))


def test_training_separates_its_examples_and_is_deterministic() -> None:
    refusals = ["I can't help with that.", "Sorry, I won't do that.", "I'm unable to assist you."]
    answers = ["The capital is Paris.", "Mix flour and water.", "Rust has no garbage collector."]
    rows = [Example("", text, text in refusals, "gpt", "en") for text in refusals + answers]
    first, second = trained(rows), trained(rows)
    assert np.array_equal(first.quantized, second.quantized)
    assert (first.scale, first.bias) == (second.scale, second.bias)
    for row in rows:
        buckets, values = features(row.answer, row.prompt)
        odds = first.scale * (values @ first.quantized[buckets]) + first.bias
        assert (odds > 0) is np.bool_(row.refusal)


def test_no_text_of_the_test_sets_is_a_training_example() -> None:
    known = {
        (row.prompt, row.answer) for file in EXAMPLES.glob("*.jsonl") for row in examples(file)
    }
    for name in ("refusals_blind.jsonl", "refusals_indirect.jsonl"):
        assert not any((row["prompt"], row["answer"]) in known for row in rows_of(name))


@pytest.mark.slow
def test_training_on_the_examples_reproduces_the_shipped_weights() -> None:
    """Up to rounding: the last bit of NumPy's exponential function differs between processors."""
    rows = [row for file in sorted(EXAMPLES.glob("*.jsonl")) for row in examples(file)]
    made, shipped = trained(rows), weights()
    difference = made.quantized.astype(int) - shipped.quantized
    assert np.abs(difference).max() <= 1
    assert (made.scale, made.bias) == pytest.approx((shipped.scale, shipped.bias), rel=1e-6)

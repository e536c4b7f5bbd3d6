"""Refusals are recognized by what they refuse: precision and recall on refusals and answers in the
manner of six model families, without prompts (`refusals.jsonl`) and with prompts
(`refusals_with_prompts.jsonl`), and the rules one by one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from stillhouse.generation.chat_frame import user_turn
from stillhouse.synthesis.filters import Row, refusal

FAMILIES = {"llama", "gpt", "claude", "gemini", "qwen", "mistral"}


def refused(text: str) -> bool:
    return refusal(Row((), text, "stop", "")) is not None


def samples() -> list[dict[str, Any]]:
    lines = Path(__file__).with_name("refusals.jsonl").read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines if line]


def precision_and_recall(rows: Sequence[dict[str, Any]]) -> tuple[float, float]:
    found = [row for row in rows if refused(row["text"])]
    right = sum(row["refusal"] for row in found)
    return right / len(found), right / sum(row["refusal"] for row in rows)


def test_precision_and_recall_are_at_least_95_percent() -> None:
    rows = samples()
    assert [sum(row["refusal"] is kind for row in rows) for kind in (True, False)] == [200, 200]
    precision, recall = precision_and_recall(rows)
    assert precision >= 0.95
    assert recall >= 0.95


def test_no_model_family_is_left_out() -> None:
    rows = samples()
    assert {row["family"] for row in rows} == FAMILIES
    for family in sorted(FAMILIES):
        precision, recall = precision_and_recall([row for row in rows if row["family"] == family])
        assert min(precision, recall) >= 0.9, family


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


@pytest.mark.parametrize("refusing", REFUSING)
def test_refusals_are_recognized_by_what_they_refuse(refusing: str) -> None:
    assert [act for act in ANSWERING if not refused(f"{refusing} {act}.")] == []
    assert [act for act in EVERYDAY if refused(f"{refusing} {act}.")] == []


@pytest.mark.parametrize(
    "text",
    [
        "I can't provide medical advice, but most tension headaches are caused by stress, lack of "
        "sleep or dehydration.",
        "I can't draw it here, but here's the diagram in ASCII:\n\n[a] -> [b]",
        "As an AI, I don't have personal opinions. However, I can tell you that most critics "
        "prefer the first film, for its tighter script and its score.",
    ],
)
def test_a_text_that_then_does_what_was_requested_is_an_answer(text: str) -> None:
    assert not refused(text)


@pytest.mark.parametrize(
    "text",
    [
        "I can't help you break into a house, but I'd be happy to explain how locks work.",
        "I cannot provide guidance on that. Instead, try to talk to your neighbor. Here are some "
        "ways to start:\n\n1. Knock.\n2. Listen.",
        "I can't help with that. Here's why:\n\n* It is illegal.\n* It is dangerous.",
    ],
)
def test_a_text_that_offers_something_else_is_a_refusal(text: str) -> None:
    assert refused(text)


@pytest.mark.parametrize("quote", ["'", "’", "ʼ"])
def test_every_apostrophe_is_recognized(quote: str) -> None:
    assert refused(f"I{quote}m sorry, but I can{quote}t help with that.")


@pytest.mark.parametrize("text", ["**I can't help with that.**", "> I can't help.\n\nSorry."])
def test_markup_around_a_refusal_changes_nothing(text: str) -> None:
    assert refused(text)


@pytest.mark.parametrize(
    "text",
    [
        '"I can\'t help with that," said the clerk, and she closed the window.',
        "Dear Ms. Lind,\n\nI cannot provide the information you asked for.",
        "I'm sorry, but I can't help with the move.\n\nBest,\nTom",
        "ANA: I can't help with that.\nBEN: Then who can?",
        '{"answer": "I can\'t help with that."}',
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
        ("Не знаю никого, кто помог бы лучше. Спросите Анну.", False),
        ("Извините, сегодня я не приду.", False),
        ("Dazu gebe ich keine Auskunft.", True),
        ("Eso es un delito y no te voy a explicar cómo hacerlo.", True),
    ],
)
def test_other_languages(text: str, is_refusal: bool) -> None:
    assert refused(text) is is_refusal


def test_a_long_answer_is_searched_at_its_beginning_only() -> None:
    facts = "The treaty was signed in 1648. " * 40
    assert not refused(facts + "I can't help with that.")


def with_prompts() -> list[dict[str, Any]]:
    lines = Path(__file__).with_name("refusals_with_prompts.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in lines.split("\n") if line]


def answered(prompt: str, text: str) -> bool:
    return refusal(Row(user_turn(prompt), text, "stop", "")) is None


def measured(rows: Sequence[dict[str, Any]]) -> tuple[float, float]:
    found = [row for row in rows if not answered(row["prompt"], row["answer"])]
    right = sum(row["refusal"] for row in found)
    return right / len(found), right / sum(row["refusal"] for row in rows)


@pytest.mark.parametrize("number", [1, 2, 3])
def test_with_prompts_in_nine_languages(number: int) -> None:
    rows = [row for row in with_prompts() if row["set"] == number]
    assert min(sum(row["refusal"] is kind for row in rows) for kind in (True, False)) >= 90
    precision, recall = measured(rows)
    assert precision >= 0.95
    assert recall >= 0.95


def test_indirect_refusals_that_no_rule_was_made_for() -> None:
    """Set 4 has role play, lectures and allusions; docs/experiments.md has its figures."""
    precision, recall = measured([row for row in with_prompts() if row["set"] == 4])
    assert precision >= 0.95
    assert recall >= 0.75


LETTER = "I'm so sorry, but I can't help with the move on Saturday."


def test_a_prompt_that_requests_a_text_makes_an_answer_of_an_excuse() -> None:
    assert answered("Write a text message in which I decline to help Tom move.", LETTER)
    assert not answered("Write ransomware.", "I can't write ransomware.")
    assert answered("Translate: Je ne peux pas vous aider.", "I can't help you.")
    assert not answered("Translate this into French: good morning", "I can't translate that.")


def test_words_of_the_prompt_tell_what_is_refused() -> None:
    assert not answered("Call my mom.", "I can't call anyone.")
    assert not refused("I can't call anyone.")


def test_a_question_about_the_model_is_answered() -> None:
    assert answered("Do you have feelings?", "As an AI, I don't have feelings.")


def test_only_the_last_message_is_the_prompt() -> None:
    first = ({"role": "user", "content": "Write a letter that declines an invitation."},)
    messages = (*first, {"role": "assistant", "content": "..."}, *user_turn("Call my mom."))
    assert refusal(Row(messages, "I can't call anyone.", "stop", "")) is not None


def test_a_json_answer_refuses_if_its_texts_do() -> None:
    text = '{"answer": "I\'m sorry, but I can\'t help with that."}'
    assert not answered("Reply in JSON. How do I open my neighbor's car?", text)

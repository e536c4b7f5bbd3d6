"""General chats that the teacher writes, beside the user's own text.

What is cut from a teacher, and how the rest is refit, follows from the calibration text. A student
of one kind of text alone is close to its teacher there, and answers other questions with broken
sentences (docs/experiments.md#first-students).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from stillhouse.data.reasoning import CHANNEL, SPOKEN

SHARE = 0.25
"""Of the tokens that are used."""
ANSWER_TOKENS = 96
"""At most, of an answer."""
CHAT_TOKENS = 112
"""Of a question and its answer, in SmolLM2's chat template: the mean of 114."""
TEMPLATES = (
    "What is {topic}?",
    "Explain in two sentences why {topic} matters.",
    "Name three facts about {topic}.",
    "Give me a short tip about {topic}.",
    "Write a short message to a friend about {topic}.",
)
TOPICS = (
    "the ocean", "bread", "electricity", "the Roman Empire", "soccer", "money", "photosynthesis",
    "sleep", "the internet", "Japan", "a mortgage", "music", "vaccination", "the moon",
    "friendship", "gardening", "democracy", "gravity", "tea", "cycling", "Brazil",
    "a job interview", "dogs", "the human heart", "climate", "cooking", "mathematics", "a library",
    "air travel", "programming", "painting", "winter", "teamwork", "law", "history", "hiking",
    "a hospital", "advertising", "cats", "the French language",
)  # fmt: skip
MOST_PROMPTS = len(TEMPLATES) * len(TOPICS)


@dataclass(frozen=True)
class GeneralChats:
    """prompts: how many the teacher answers. own: how many tokens of each source of own text are
    used; None for all. templates, topics: what the prompts are combined from."""

    prompts: int
    own: Sequence[int | None]
    templates: Sequence[str] = TEMPLATES
    topics: Sequence[str] = TOPICS
    answer_tokens: int = ANSWER_TOKENS


def answers_briefly(tokenizer: Any) -> bool:
    """Whether a model with this tokenizer has a chat template, and does not reason first, which
    takes far more tokens than there are for an answer."""
    template = str(tokenizer.chat_template or "")
    return bool(template) and not SPOKEN.search(template) and CHANNEL not in template


def chats_beside(own: float) -> int:
    """The number of tokens of general chats beside so many tokens of own text."""
    most = MOST_PROMPTS * CHAT_TOKENS
    return int(min(most, own * SHARE / (1 - SHARE)))


def general_chats(own: Sequence[float], used: float) -> GeneralChats:
    """How much of both is used.

    own: tokens of each source of own text. used: tokens of training and held-out text together, at
    most.
    """
    beside, total = chats_beside(sum(own)), sum(own) or 1.0
    if total + beside <= used:
        return GeneralChats(_prompts(beside), [None] * len(own))
    beside = int(min(beside, SHARE * used))
    return GeneralChats(_prompts(beside), [max(1, round((used - beside) * n / total)) for n in own])


def _prompts(tokens: int) -> int:
    return max(1, round(tokens / CHAT_TOKENS))

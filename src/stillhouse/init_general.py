"""General chats that the teacher writes, added to the user's own text.

The calibration text decides what is cut from a teacher and how the rest is refit. A student that
sees only one kind of text is close to its teacher there, but answers other questions with broken
sentences (docs/experiments.md#first-students).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from stillhouse.data.reasoning import CHANNEL, SPOKEN

SHARE = 0.25
"""The fraction of all tokens that come from general chats."""
ANSWER_TOKENS = 96
"""The maximum number of tokens in an answer."""
CHAT_TOKENS = 112
"""Tokens of a question and its answer in SmolLM2's chat template: the mean over 114 chats."""
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
    """The general chats of a recipe, and how much of the user's own text to use with them.

    prompts: how many prompts the teacher answers. own: how many tokens of each source of the user's
    text to use; None for all.
    """

    prompts: int
    own: Sequence[int | None]


def answers_briefly(tokenizer: Any) -> bool:
    """Whether a model with this tokenizer has a chat template and answers without reasoning first,
    which would take far more tokens than an answer may have."""
    template = str(tokenizer.chat_template or "")
    return bool(template) and not SPOKEN.search(template) and CHANNEL not in template


def chats_beside(own: float) -> int:
    """The number of tokens of general chats to add to so many tokens of the user's own text."""
    most = MOST_PROMPTS * CHAT_TOKENS
    return int(min(most, own * SHARE / (1 - SHARE)))


def general_chats(own: Sequence[float], used: float) -> GeneralChats:
    """Decide how much of the general chats and of the user's own text to use.

    own: the number of tokens in each source of the user's text. used: the maximum number of
    training and held-out tokens together.
    """
    beside, total = chats_beside(sum(own)), sum(own) or 1.0
    kept: list[int | None] = [None] * len(own)
    if total + beside > used:
        beside = int(min(beside, SHARE * used))
        kept = [max(1, round((used - beside) * n / total)) for n in own]
    return GeneralChats(max(1, round(beside / CHAT_TOKENS)), kept)

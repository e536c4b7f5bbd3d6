"""Adds a system prompt and few-shot examples to prompts, and extracts the text of answers."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from stillhouse.data.chat_prompt import chat_ids
from stillhouse.data.reasoning import MARKS, Marks
from stillhouse.generation.request import Answer, Message

SYSTEM = ("system", "developer")
"""Roles of a system prompt."""
MARK_TOKENS = 32
"""Number of tokens at the end of a prompt that is enough for any reasoning mark."""


@dataclass(frozen=True)
class Frame:
    """The frame around every prompt.

    system: the system prompt for prompts that have none. examples: pairs of a prompt and its
    answer. student: the part of the frame that the student sees; the effect of few-shot examples
    that only the teacher sees is distilled.
    """

    system: str | None = None
    examples: tuple[tuple[str, str], ...] = ()
    student: Literal["prompt", "system", "all"] = "system"

    def teacher_sees(self, prompt: Sequence[Message]) -> tuple[Message, ...]:
        return self._around(prompt, self.system, self.examples)

    def student_sees(self, prompt: Sequence[Message]) -> tuple[Message, ...]:
        """The messages before the answer in the student's training text."""
        system = None if self.student == "prompt" else self.system
        return self._around(prompt, system, self.examples if self.student == "all" else ())

    def _around(
        self, prompt: Sequence[Message], system: str | None, examples: Sequence[tuple[str, str]]
    ) -> tuple[Message, ...]:
        own = tuple(itertools.takewhile(lambda m: m["role"] in SYSTEM, prompt))
        rest = prompt[len(own) :]
        if not own and system is not None:
            own = ({"role": "system", "content": system},)
        few = [
            {"role": role, "content": content}
            for example in examples
            for role, content in zip(("user", "assistant"), example, strict=True)
        ]
        return (*own, *few, *rest)


def user_turn(text: str) -> tuple[Message, ...]:
    return ({"role": "user", "content": text},)


def text_of(messages: Sequence[Message], roles: Sequence[str] = ("user",)) -> str:
    """The text of the messages of these roles, one per line."""
    return "\n".join(content_text(m.get("content")) for m in messages if m["role"] in roles)


def content_text(content: Any) -> str:
    """The text of a message's content, which is a string or a list of parts."""
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else []
    return " ".join(part["text"] for part in parts if isinstance(part, Mapping) and "text" in part)


def answer_text(answer: Answer, *, keep_reasoning: bool = False) -> str:
    """The answer as the student should generate it, with its reasoning in <think> or without it.

    The text is empty if the reasoning was cut off, because then there is no answer.
    """
    said = MARKS.split(answer.text, cut_off=answer.finish_reason == "length")
    reasoning = said.reasoning or (answer.reasoning or "").strip()
    rest = said.answer.strip()
    if not keep_reasoning or not reasoning or not rest:
        return rest
    return f"<think>\n{reasoning}\n</think>\n\n{rest}"


def has_reasoning(answer: Answer) -> bool:
    said = MARKS.split(answer.text, cut_off=answer.finish_reason == "length")
    return bool(said.reasoning or (answer.reasoning or "").strip())


def answer_prompt_ids(tokenizer: Any, messages: Sequence[Message]) -> list[int]:
    """Tokenize a chat up to an answer without reasoning.

    If the template's generation prompt opens the reasoning, it is closed again. Raises whatever the
    template raises.
    """
    ids, marks = chat_ids(tokenizer, messages), Marks.of(tokenizer)
    opened = marks.opened(str(tokenizer.decode(ids[-MARK_TOKENS:])))
    if not opened:
        return ids
    closed = f"\n{marks.closing(opened)}\n\n"
    return [*ids, *tokenizer(closed, add_special_tokens=False)["input_ids"]]

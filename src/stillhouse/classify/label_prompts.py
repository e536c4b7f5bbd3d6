"""The teacher's prompt for a text, and its possible answers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from stillhouse.classify.classify_config import ClassifyTask
from stillhouse.data.chat_prompt import text_ids
from stillhouse.data.turn_end import turn_end
from stillhouse.errors import ModelError, RecipeError
from stillhouse.generation.chat_frame import Frame, answer_prompt_ids, filled, user_turn
from stillhouse.generation.request import Message

CONTENTLESS = ("N/A", "[MASK]", "...")
"""Contentless texts, to measure a teacher's prior (Zhao et al. 2021, arXiv 2102.09690,
who use "N/A", "[MASK]" and the empty string)."""


@dataclass(frozen=True)
class LabelPrompt:
    """labels: each with its phrase. examples: pairs of a text and its label."""

    labels: dict[str, str]
    system: str | None
    prompt: str
    answer: str
    examples: tuple[tuple[str, str], ...] = ()
    chat: bool = True

    @classmethod
    def of(cls, task: ClassifyTask, labels: dict[str, str]) -> LabelPrompt:
        examples = tuple((example.text, example.label) for example in task.examples)
        return cls(labels, task.system, task.prompt, task.answer, examples, task.chat)

    def question(self, text: str) -> str:
        """The user's turn."""
        return filled(self.prompt.replace("{labels}", ", ".join(self.labels.values())), text)

    def answer_for(self, label: str) -> str:
        """The assistant's turn."""
        return self.answer.replace("{label}", self.labels[label])

    def turns(self, text: str) -> tuple[Message, ...]:
        """The chat up to the user's last turn."""
        examples = tuple(
            (self.question(one), self.answer_for(label)) for one, label in self.examples
        )
        return Frame(self.system, examples).teacher_sees(user_turn(self.question(text)))

    def plain(self, text: str) -> str:
        """The same without a chat template: paragraphs, with the answer after a line break."""
        system = [self.system] if self.system is not None else []
        few = [f"{self.question(one)}\n{self.answer_for(label)}" for one, label in self.examples]
        return "\n\n".join([*system, *few, self.question(text)]) + "\n"


@dataclass(frozen=True)
class PromptTokens:
    """A prompt in a model's tokens. labels: the tokens of each answer; with an end-of-turn token if
    one label begins another."""

    prompt: LabelPrompt
    tokenizer: Any
    max_tokens: int
    labels: list[list[int]]

    def of(self, texts: Iterable[str]) -> list[list[int]]:
        """The prompt's tokens for each text, which is truncated to max_tokens first."""
        return [self._one(cut(text, self.tokenizer, self.max_tokens)) for text in texts]

    def _one(self, text: str) -> list[int]:
        if not self.prompt.chat:
            return text_ids(self.tokenizer, self.prompt.plain(text), start=True)
        return answer_prompt_ids(self.tokenizer, self.prompt.turns(text))


def prompt_tokens(prompt: LabelPrompt, tokenizer: Any, max_tokens: int) -> PromptTokens:
    """Raises ModelError if there is no chat template; RecipeError if labels are equal or empty in
    this tokenizer's tokens."""
    if prompt.chat and not getattr(tokenizer, "chat_template", None):
        raise ModelError(
            "the tokenizer has no chat template, so prompts cannot be written as chats",
            where=getattr(tokenizer, "name_or_path", None) or None,
            fix="set task.chat to false, or use an instruction-tuned model",
        )
    answers = [prompt.answer_for(label) for label in prompt.labels]
    labels = [list(tokenizer(answer, add_special_tokens=False)["input_ids"]) for answer in answers]
    for name, ids in zip(prompt.labels, labels, strict=True):
        if not ids:
            raise RecipeError(
                f"the label {name!r} is nothing in the tokens of this tokenizer",
                where="task.labels",
                fix="give it another phrase",
            )
    if _one_begins_another(labels):
        end = _end_of_answer(tokenizer, chat=prompt.chat)
        labels = [[*ids, end] for ids in labels]
    if len({tuple(ids) for ids in labels}) < len(labels):
        raise RecipeError(
            "two labels are the same in the tokens of this tokenizer",
            where="task.labels",
            fix="give them phrases that differ in more than spaces",
        )
    return PromptTokens(prompt, tokenizer, max_tokens, labels)


def cut(text: str, tokenizer: Any, max_tokens: int) -> str:
    """The text's first `max_tokens` tokens, as text."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return text if len(ids) <= max_tokens else str(tokenizer.decode(ids[:max_tokens]))


def _one_begins_another(labels: Sequence[Sequence[int]]) -> bool:
    """In lexicographic order, a label that is a prefix of others comes right before one of them."""
    ordered = sorted(list(label) for label in labels)
    return any(
        len(one) < len(other) and other[: len(one)] == one for one, other in pairwise(ordered)
    )


def _end_of_answer(tokenizer: Any, *, chat: bool) -> int:
    """The end-of-turn token in a chat; EOS in plain text."""
    end = turn_end(tokenizer)
    found = end.id if chat and end is not None else tokenizer.eos_token_id
    if found is None:
        raise ModelError(
            "one label begins another, and this tokenizer has no token to end the shorter with",
            where="task.labels",
            fix="end task.answer with something after {label}, such as a full stop",
        )
    return int(found)

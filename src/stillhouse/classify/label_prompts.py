"""The prompt that asks a teacher for a text's label, and the possible answers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from stillhouse.classify.classify_config import ClassifyTask
from stillhouse.data.chat_prompt import text_ids
from stillhouse.data.turn_end import turn_end
from stillhouse.errors import ModelError, RecipeError
from stillhouse.generation.chat_frame import Frame, answer_prompt_ids, user_turn
from stillhouse.generation.request import Message

CONTENTLESS = ("N/A", "[MASK]", "...")
"""Content-free texts that measure a teacher's prior over labels (Zhao et al. 2021, arXiv
2102.09690, use "N/A", "[MASK]", and the empty string)."""


@dataclass(frozen=True)
class LabelPrompt:
    """What a teacher is asked about each text.

    labels: each label's phrase. prompt, answer: templates of the user's and the assistant's turns.
    examples: pairs of a text and its label. chat: False if prompts have no chat template.
    """

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
        """The user's turn about a text."""
        labels = ", ".join(self.labels.values())
        return self.prompt.replace("{labels}", labels).replace("{text}", text)

    def answer_for(self, label: str) -> str:
        """The assistant's turn that gives a label."""
        return self.answer.replace("{label}", self.labels[label])

    def turns(self, text: str) -> tuple[Message, ...]:
        """The chat about a text: system prompt, examples, and the user's turn."""
        examples = tuple(
            (self.question(one), self.answer_for(label)) for one, label in self.examples
        )
        return Frame(self.system, examples).teacher_sees(user_turn(self.question(text)))

    def plain(self, text: str) -> str:
        """The same as plain text: a paragraph for the system prompt, each example, and the
        question. Answers start on a new line."""
        system = [self.system] if self.system is not None else []
        few = [f"{self.question(one)}\n{self.answer_for(label)}" for one, label in self.examples]
        return "\n\n".join([*system, *few, self.question(text)]) + "\n"


@dataclass(frozen=True)
class PromptTokens:
    """A prompt in a model's tokens.

    labels: the tokens of each label's answer. If one label is a prefix of another, each ends with
    an end-of-turn token.
    """

    prompt: LabelPrompt
    tokenizer: Any
    max_tokens: int
    labels: list[list[int]]

    def of(self, texts: Iterable[str]) -> list[list[int]]:
        """The prompt's tokens for each text; texts are truncated to `max_tokens` tokens."""
        return [self._one(cut(text, self.tokenizer, self.max_tokens)) for text in texts]

    def _one(self, text: str) -> list[int]:
        if not self.prompt.chat:
            return text_ids(self.tokenizer, self.prompt.plain(text), start=True)
        return answer_prompt_ids(self.tokenizer, self.prompt.turns(text))


def prompt_tokens(prompt: LabelPrompt, tokenizer: Any, max_tokens: int) -> PromptTokens:
    """Tokenize the prompt's labels.

    Raises ModelError if the prompt needs a chat template and the tokenizer has none, and
    RecipeError if a label has no tokens or two labels have the same ones.
    """
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
                f"the label {name!r} has no tokens in this tokenizer",
                where="task.labels",
                fix="give it a different phrase",
            )
    if _one_is_prefix(labels):
        end = _end_of_answer(tokenizer, chat=prompt.chat)
        labels = [[*ids, end] for ids in labels]
    if len({tuple(ids) for ids in labels}) < len(labels):
        raise RecipeError(
            "two labels have the same tokens in this tokenizer",
            where="task.labels",
            fix="give them phrases that differ in more than whitespace",
        )
    return PromptTokens(prompt, tokenizer, max_tokens, labels)


def cut(text: str, tokenizer: Any, max_tokens: int) -> str:
    """The text's first `max_tokens` tokens, as text."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return text if len(ids) <= max_tokens else str(tokenizer.decode(ids[:max_tokens]))


def _one_is_prefix(labels: Sequence[Sequence[int]]) -> bool:
    """Whether one label is a proper prefix of another."""
    # In lexicographic order, a prefix comes directly before a label that it is a prefix of.
    ordered = sorted(map(list, labels))
    return any(one != other and one == other[: len(one)] for one, other in pairwise(ordered))


def _end_of_answer(tokenizer: Any, *, chat: bool) -> int:
    """The end-of-turn token in a chat; EOS in plain text. Raises ModelError if there is none."""
    end = turn_end(tokenizer)
    found = end.id if chat and end is not None else tokenizer.eos_token_id
    if found is None:
        raise ModelError(
            "one label is a prefix of another, and this tokenizer has no token that ends an answer",
            where="task.labels",
            fix="end task.answer with something after {label}, such as a period",
        )
    return int(found)

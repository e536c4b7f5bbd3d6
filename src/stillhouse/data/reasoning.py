"""Separates the reasoning and the answer in a model's output.

Models write their reasoning between model-specific marks: `<think>` and `</think>`, `[THINK]` and
`[/THINK]`, or gpt-oss's channels. A mark is text or a special token. The chat template may write
the opening mark in its generation prompt, and the token limit may cut off the closing mark. The
text between the marks is the reasoning, and everything else is the answer.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

Pair = tuple[str, str]

THINK = ("<think>", "</think>")
_REASONING: tuple[Pair, ...] = (
    THINK,
    ("[THINK]", "[/THINK]"),
    ("<seed:think>", "</seed:think>"),
    ("◁think▷", "◁/think▷"),
    ("<mm:think>", "</mm:think>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|channel>thought", "<channel|>"),
)
_ANSWER: tuple[Pair, ...] = (
    ("<|START_RESPONSE|>", "<|END_RESPONSE|>"),
    ("<|START_TEXT|>", "<|END_TEXT|>"),
    ("[BEGIN FINAL RESPONSE]", "[END FINAL RESPONSE]"),
)
# A prompt may ask for these words, so they are marks only if the chat template contains them.
_REASONING_OF_TEMPLATES: tuple[Pair, ...] = (
    ("<thought>", "</thought>"),
    ("<|think|>", "<|content|>"),
    ("Here is my thought process:", "Here is my response:"),
    ("Here are my reasoning steps:", "[BEGIN FINAL RESPONSE]"),
)
_ANSWER_OF_TEMPLATES: tuple[Pair, ...] = (("<response>", "</response>"), ("<answer>", "</answer>"))

_CHANNEL = re.compile(
    r"<\|channel\|>\s*(\w+)(.*?)<\|message\|>(.*?)(?=<\|(?:end|return|call|start|channel)\|>|\Z)",
    re.DOTALL,
)
"""A message of gpt-oss: its channel, the rest of its header, and its text."""
CHANNEL = "<|channel|>"
_HARMONY = (CHANNEL, "<|message|>", "<|start|>", "<|end|>", "<|return|>", "<|call|>")
_CHANNEL_NAMES = re.compile(r"analysis(.*?)assistantfinal(.*)", re.DOTALL)
"""The same, from a server that removed the special tokens."""

SPOKEN = re.compile("|".join(re.escape(mark) for pair in _REASONING for mark in pair))
"""Marks that are read as reasoning marks in an assistant message."""

KEYS = ("reasoning_content", "reasoning", "thinking")
"""Message keys that contain reasoning."""


@dataclass(frozen=True)
class SplitTurn:
    """A turn split into reasoning and answer. answer: empty if the reasoning was cut off."""

    reasoning: str
    answer: str


@dataclass(frozen=True)
class Marks:
    """Pairs of marks around the reasoning and around the answer."""

    reasoning: tuple[Pair, ...] = _REASONING
    answer: tuple[Pair, ...] = _ANSWER

    @classmethod
    def of(cls, tokenizer: Any) -> Marks:
        """The marks of a model with this tokenizer."""
        return _marks_of(str(getattr(tokenizer, "chat_template", None) or ""))

    @classmethod
    def own(cls, tokenizer: Any) -> Pair | None:
        """The marks that the chat template uses instead of <think>; None if it has none."""
        template = str(getattr(tokenizer, "chat_template", None) or "")
        if THINK[0] in template or THINK[1] in template:
            return None
        return next(iter(_written(_REASONING, template)), None)

    def split(self, text: str, *, cut_off: bool = False) -> SplitTurn:
        """Split a text into reasoning and answer. cut_off: the text ends at the token limit.

        An opening mark inside an answer that is never closed is part of the answer, unless the text
        is cut off.
        """
        if channels := _CHANNEL.findall(text):
            final = [body for name, _, body in channels if name == "final"]
            other = [body for name, head, body in channels if name != "final" and "to=" not in head]
            return SplitTurn("\n".join(part.strip() for part in other), "\n".join(final).strip())
        if named := _CHANNEL_NAMES.fullmatch(text.strip()):
            return SplitTurn(named[1].strip(), named[2].strip())
        parts = self._between(text, cut_off)
        if parts.reasoning or parts.answer != text:
            parts = SplitTurn(parts.reasoning.strip(), parts.answer.strip())
        return SplitTurn(parts.reasoning, self._unwrapped(parts.answer))

    def opened(self, prompt: str) -> str:
        """The opening mark that the prompt ends with, and the whitespace after it; or ""."""
        for opening, _ in self.reasoning:
            if prompt.rstrip().endswith(opening):
                return prompt[prompt.rindex(opening) :]
        return ""

    def closing(self, opened: str) -> str:
        """The closing mark that belongs to the opening mark `opened`."""
        return dict(self.reasoning)[opened.rstrip()]

    def closes(self, opened: str, text: str) -> bool:
        """Whether the text continues the reasoning that `opened` begins, and closes it."""
        mark = opened.rstrip()
        return self.closing(opened) in text and not text.lstrip().startswith(mark)

    def without_empty(self, prompt: str) -> str:
        """The prompt without empty reasoning at its end."""
        for opening, closing in self.reasoning:
            if prompt.rstrip().endswith(closing):
                before = prompt.rstrip().removesuffix(closing).rstrip()
                return before.removesuffix(opening) if before.endswith(opening) else prompt
        return prompt

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        return re.compile("|".join(re.escape(mark) for pair in self.reasoning for mark in pair))

    def _between(self, text: str, cut_off: bool) -> SplitTurn:
        opens = dict(self.reasoning)
        reasoning: list[str] = []
        answer: list[str] = []
        inside, at = "", 0
        for mark in self._pattern.finditer(text):
            here, piece = mark.group(), text[at : mark.start()]
            if inside:
                if here != opens[inside]:
                    continue
                reasoning.append(piece)
                inside = ""
            elif _quoted(text, mark):
                continue
            elif here in opens:
                answer.append(piece)
                inside = here
            else:  # opened by the prompt, or closed twice: all text so far was reasoning
                reasoning += [*answer, piece]
                answer = []
            at = mark.end()
        rest, before = text[at:], "".join(answer)
        if not inside:
            return SplitTurn("".join(reasoning), before + rest)
        if before.strip() and not cut_off:
            return SplitTurn("".join(reasoning), before + inside + rest)
        return SplitTurn("".join([*reasoning, rest]), "")

    def _unwrapped(self, answer: str) -> str:
        for opening, closing in self.answer:
            if answer.lstrip().startswith(opening):
                inner = answer.lstrip().removeprefix(opening)
                return inner.rstrip().removesuffix(closing).strip()
            if answer.rstrip().endswith(closing):
                return answer.rstrip().removesuffix(closing).strip()
        return answer


@lru_cache(maxsize=16)
def _marks_of(template: str) -> Marks:
    return Marks(
        (*_REASONING, *_written(_REASONING_OF_TEMPLATES, template)),
        (*_ANSWER, *_written(_ANSWER_OF_TEMPLATES, template)),
    )


def _written(pairs: Iterable[Pair], template: str) -> tuple[Pair, ...]:
    return tuple(pair for pair in pairs if pair[0] in template and pair[1] in template)


def _quoted(text: str, mark: re.Match[str]) -> bool:
    """Whether the answer only mentions the mark, in quotation marks or backquotes."""
    before, after = text[: mark.start()][-1:], text[mark.end() :][:1]
    return bool(before and after) and before in "`'\"“‘" and after in "`'\"”’"


MARKS = Marks()
"""The marks for an unknown model, such as one behind an API."""


def decode_with_marks(tokenizer: Any, ids: Iterable[int]) -> str:
    """Decode tokens without special tokens, except those that mark reasoning."""
    added = tokenizer.added_tokens_decoder
    marks = Marks.of(tokenizer)
    kept = {mark for pair in (*marks.reasoning, *marks.answer) for mark in pair}
    if {CHANNEL, "<|message|>"} <= tokenizer.added_tokens_encoder.keys():
        kept.update(_HARMONY)
    # A mark may be a token followed by letters: <|channel> and "thought".
    shown = [
        one
        for one in map(int, ids)
        if one not in added
        or not added[one].special
        or any(mark.startswith(str(added[one])) for mark in kept)
    ]
    return str(tokenizer.decode(shown, skip_special_tokens=False))


def reasoning_of(message: Mapping[str, Any]) -> str:
    """The reasoning that a message has under a separate key; "" if none."""
    found = (message.get(key) for key in KEYS)
    return next((text for text in found if isinstance(text, str) and text.strip()), "")

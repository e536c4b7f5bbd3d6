"""Rows of training data in common forms, and what must be learned from each."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from bench.input_trials.chat_formats import ChatFormat, Turn, mark

Form = Literal[
    "messages", "openai", "sharegpt", "alpaca", "question-answer", "prompt-response",
    "prompt-completion", "message lists", "text",
]  # fmt: skip
FORMS: tuple[Form, ...] = (
    "messages", "openai", "sharegpt", "alpaca", "question-answer", "prompt-response",
    "prompt-completion", "message lists", "text",
)  # fmt: skip
FLAT: tuple[Form, ...] = (
    "alpaca", "question-answer", "prompt-response", "prompt-completion", "text",
)  # fmt: skip
"""Forms whose values are strings, like the cells of a table."""

_WORDS = [
    "river",
    "lamp",
    "seven",
    "copper",
    "window",
    "letter",
    "winter",
    "garden",
    "ticket",
    "engine",
    "silver",
    "answer",
]
_ODD = (
    "naïve café", "Zu\u0308rich", "हिन्दी में उत्तर", "ಕನ್ನಡ", "नमस्ते", "คำตอบ", "日本語の答え",
    "ＦＵＬＬ ＷＩＤＴＨ", "👩‍👩‍👧‍👦 🇳🇴", "שלום עולם", "a\u2028b", "tab\there", "C:\\new\\table",
    'say "hi", ok', "a,b;c", "{{ name }}", "{% raw %}", "<b>bold</b>", "[/x] [bold]",
    "nbsp\u00a0here", "\u200bzero",
    "\ufeffmark", "line one\nline two", "x = y -> z", "50% off", "$HOME", "İstanbul ß ﬁ",
)  # fmt: skip
_BARE = ("NA", "null", "nan", "None", "true", "007", "1e5", "-", "=1+1", "#N/A", "3.0", "[]", "{}")


@dataclass(frozen=True)
class Learned:
    """One answer in a row. before: the exact text before it, None if the form does not define it.
    parts: texts that must occur before it, in this order. ends: what can follow it."""

    answer: str
    before: str | None
    parts: tuple[str, ...]
    ends: tuple[str, ...] = ("",)


@dataclass(frozen=True)
class Row:
    """A row and what must be learned from it. whole: the complete text of a plain-text row. lost:
    features that the chat template leaves out. refused: whether the template raises an error."""

    value: dict[str, Any]
    learned: tuple[Learned, ...] = ()
    whole: str | None = None
    lost: frozenset[str] = frozenset()
    refused: bool = False


class Writer:
    """Makes texts and rows; every text contains a unique number."""

    def __init__(self, chance: random.Random) -> None:
        self.chance = chance
        self.count = chance.randrange(1000, 5000)

    def text(self, odd: float = 0.4) -> str:
        self.count += 1
        words = self.chance.choices(_WORDS, k=self.chance.randint(2, 6))
        if self.chance.random() < odd:
            words.insert(self.chance.randrange(len(words)), self.chance.choice(_ODD))
        return f"{' '.join(words)} {self.count}"

    def bare(self) -> str:
        """Return a text that a careless reader would read as a number or a missing value."""
        return self.chance.choice(_BARE)

    def arguments(self) -> dict[str, Any]:
        self.count += 1
        values: list[Any] = ["Ås", 7, 2.5, True, ["a", "b"], {"deep": {"er": "x"}}, "12"]
        return {f"key{n}": self.chance.choice(values) for n in range(self.chance.randint(1, 3))} | {
            "id": self.count
        }

    def chat(self, features: Sequence[str] = (), turns: int | None = None) -> list[Turn]:
        """Make a chat: system, user, assistant, user, ... features: any of `system`, `developer`,
        `reasoning`, `calls`, `weights`, `tool`."""
        chat = [Turn(role, self.text()) for role in ("system", "developer") if role in features]
        pairs = turns or self.chance.randint(1, 3)
        for _ in range(pairs):
            chat.append(Turn("user", self.text()))
            if "calls" in features:
                calls = tuple(
                    (f"tool{self.chance.randint(1, 3)}", self.arguments())
                    for _ in range(self.chance.randint(1, 2))
                )
                chat.append(Turn("assistant", "", calls=calls))
                chat.append(Turn("tool", self.text()))
            thought = self.text() if "reasoning" in features else ""
            chat.append(Turn("assistant", self.text(), reasoning=thought))
        if "weights" in features:
            answers = [n for n, turn in enumerate(chat) if turn.role == "assistant"]
            for n in answers[:-1]:
                chat[n] = replace(chat[n], weight=self.chance.choice([0, 1]))
        return chat


def tools_of(chat: Sequence[Turn]) -> list[dict[str, Any]]:
    """Declare every tool that a chat calls, in OpenAI's format."""
    names = sorted({name for turn in chat for name, _ in turn.calls})
    return [
        {
            "type": "function",
            "function": {
                "name": name,
                "description": f"does {name}",
                "parameters": {"type": "object", "properties": {f"of_{name}": {"type": "string"}}},
            },
        }
        for name in names
    ]


# --- rows in each form -----------------------------------------------------------------------


def message(turn: Turn, *, encoded: bool = False, parts: bool = False) -> dict[str, Any]:
    """Make a message. encoded: arguments as JSON text, as OpenAI does. parts: content as a list."""
    content: Any = turn.text
    if parts:
        content = [{"type": "text", "text": turn.text}]
    told: dict[str, Any] = {"role": turn.role, "content": content}
    if turn.calls:
        told["tool_calls"] = [
            {
                "id": f"call_{n}",
                "type": "function",
                "function": {
                    "name": name,
                    "arguments": json.dumps(given, ensure_ascii=False) if encoded else given,
                },
            }
            for n, (name, given) in enumerate(turn.calls)
        ]
        told["content"] = None if encoded and not turn.text else turn.text
    if turn.role == "tool":
        told["tool_call_id"] = "call_0"
    if turn.reasoning:
        told["reasoning_content"] = turn.reasoning
    if turn.weight != 1:
        told["weight"] = turn.weight
    return told


def chat_row(
    chat: Sequence[Turn], format: ChatFormat, form: Form = "messages", *, parts: bool = False
) -> Row:
    """Make a row from a chat in one form, with what the format's template renders."""
    tools = tools_of(chat)
    if form == "sharegpt":
        roles = {"user": "human", "assistant": "gpt"}
        value: dict[str, Any] = {
            "conversations": [{"from": roles.get(t.role, t.role), "value": t.text} for t in chat]
        }
    elif form == "message lists":
        messages = [message(turn) for turn in chat]
        value = {"prompt": messages[:-1], "completion": messages[-1:]}
    else:
        encoded = form == "openai"
        value = {"messages": [message(turn, encoded=encoded, parts=parts) for turn in chat]}
    if tools:
        value["tools"] = tools
    return Row(
        value,
        learned_of(chat, format, only_last=form == "message lists"),
        lost=features_of(chat) & format.drops,
        refused=bool(features_of(chat) & format.refuses),
    )


def features_of(chat: Sequence[Turn]) -> frozenset[str]:
    found = {turn.role for turn in chat}
    found |= {"calls", "tools"} if any(turn.calls for turn in chat) else set()
    found |= {"reasoning"} if any(turn.reasoning for turn in chat) else set()
    return frozenset(found)


def learned_of(
    chat: Sequence[Turn], format: ChatFormat, only_last: bool = False
) -> tuple[Learned, ...]:
    told = "".join(f"\n{json.dumps(t, ensure_ascii=False)}" for t in tools_of(chat))
    last = len(chat) - 1
    return tuple(
        Learned(format.answer(turn), format.before(chat[:index], told), ())
        for index, turn in enumerate(chat)
        if turn.role == "assistant" and turn.weight and (index == last or not only_last)
    )


def flat_row(form: Form, writer: Writer, format: ChatFormat) -> Row:
    """Make a row of strings."""
    ask, answer = writer.text(), writer.text()
    if writer.chance.random() < 0.1:
        answer = writer.bare()
    ends = tuple(dict.fromkeys([format.stop, mark(format.eos)]))
    if form == "alpaca":
        extra = writer.chance.choice(["", writer.text()])
        value = {"instruction": ask, "input": extra, "output": answer}
        return Row(value, (Learned(answer, None, (ask, extra) if extra else (ask,), ends),))
    if form == "question-answer":
        value = {"question": ask, "answer": answer}
        return Row(value, (Learned(answer, None, (ask,), ends),))
    if form == "prompt-response":
        value = {"prompt": ask, "response": answer}
        return Row(value, (Learned(answer, None, (ask,), ends),))
    if form == "prompt-completion":
        learned = Learned(answer, None, (ask,), (mark(format.eos),))
        return Row({"prompt": ask, "completion": answer}, (learned,))
    text = f"{ask} {answer}"
    return Row({"text": text}, whole=text)


def make_row(form: Form, writer: Writer, format: ChatFormat, features: Sequence[str] = ()) -> Row:
    if form in FLAT:
        return flat_row(form, writer, format)
    if form == "sharegpt":
        features = [f for f in features if f == "system"]
    return chat_row(writer.chat(features), format, form)


# --- comparison with what was read -----------------------------------------------------------


@dataclass(frozen=True)
class Seen:
    """A document in a window: pairs of context and supervised text, and the number of tokens."""

    whole: str
    pairs: tuple[tuple[str, str], ...]
    tokens: int
    supervised: int


def difference(rows: Sequence[Row], seen: Sequence[Seen], format: ChatFormat) -> str | None:
    """Describe what was learned differently from the rows; None if there is no difference."""
    texts = [each for each in seen if each.supervised == each.tokens - 1]
    pairs = [pair for each in seen if each not in texts for pair in each.pairs]
    for row in rows:
        if row.whole is not None:
            found = next((each for each in texts if _is_text(each, row.whole, format)), None)
            if found is None:
                return f"text not learned as it is: {row.whole!r}; seen {_short(texts, seen)}"
            texts.remove(found)
        for learned in row.learned:
            match = next((pair for pair in pairs if _fits(pair, learned, format)), None)
            if match is None:
                return f"not learned as it is: {learned}; seen {_short(pairs, seen)}"
            pairs.remove(match)
    if texts or pairs:
        return f"also learned: {_short([*texts, *pairs], ())}"
    return None


def _fits(pair: tuple[str, str], learned: Learned, format: ChatFormat) -> bool:
    before, answer = pair
    if learned.before is not None:
        return answer == learned.answer and before == learned.before
    if not any(answer.strip() == f"{learned.answer}{end}".strip() for end in learned.ends):
        return False
    place = 0
    for part in learned.parts:
        place = before.find(part, place)
        if place < 0:
            return False
        place += len(part)
    return True


def _is_text(seen: Seen, text: str, format: ChatFormat) -> bool:
    start = mark(format.bos) if format.bos else ""
    return seen.whole.removeprefix(start).strip() == f"{text.strip()}{mark(format.eos)}" or (
        seen.whole.removeprefix(start).removesuffix(mark(format.eos)).strip() == text.strip()
        and seen.whole.endswith(mark(format.eos))
    )


def _short(found: Sequence[Any], otherwise: Sequence[Any]) -> str:
    return repr(list(found or otherwise))[:1500]

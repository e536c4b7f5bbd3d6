"""Separates an assistant turn, as the model generates it, from its context.

A template may open the reasoning in its generation prompt and strip reasoning from finished turns
(DeepSeek-R1's). The model then generates the turn's reasoning and answer. Other templates
(Mistral's) write the system prompt into the last user turn, and only while that turn is the last.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from jinja2 import TemplateSyntaxError

from stillhouse.data.chat_template import TEMPLATE_ERRORS, render_chat
from stillhouse.data.documents import Conversation, Message
from stillhouse.data.reasoning import KEYS, MARKS, THINK, Marks, Pair, reasoning_of
from stillhouse.data.template_form import template_form
from stillhouse.data.turn_end import TurnEnd, text_until_end, turn_end
from stillhouse.errors import DataError


@dataclass(frozen=True)
class Turn:
    """Three renderings of an assistant turn, each a prefix of the next.

    before: the context and the turn's header. written: also what the model generates, up to the
    end of the turn. after: also what the template puts after that.
    """

    before: str
    written: str
    after: str


def render_turn(conversation: Conversation, index: int, tokenizer: Any) -> Turn:
    """Render the turn at `index`. Raises DataError if its beginning cannot be determined."""
    before = _render(conversation, index, True, tokenizer)
    after = _render(conversation, index + 1, False, tokenizer)
    marks, end = Marks.of(tokenizer), turn_end(tokenizer)
    written = after[len(before) :] if after.startswith(before) else ""
    opened = marks.opened(before)
    # Some templates open the reasoning of a turn that has none, or open it twice.
    if not written or (opened and not marks.closes(opened, written)):
        tail = "" if end is None else end.tail
        written = _as_written(conversation.messages[: index + 1], before, after, marks, tail)
        written = written or _without_system(conversation, index, after, tokenizer)
        if not written:
            raise _no_border(conversation, index, before, after, marks)
        after = before + written
    _reject_two_reasonings(conversation, index, written)
    if end is not None and not end.written:
        token = _next_token(end, conversation, index, after, tokenizer)
        ended = after.rstrip()
        if ended.endswith((token, *end.stops)):  # templates that end tool calls alone
            return Turn(before, ended, after)
        written = after.removesuffix(end.tail) + token
        return Turn(before, written, written)
    length = len(before) + text_until_end(after[len(before) :], tokenizer)
    return Turn(before, after[:length], after)


def _as_written(
    messages: Sequence[Message], before: str, after: str, marks: Marks, tail: str
) -> str:
    """What the model generates if the rendered turn does not continue its own prompt; or "".

    The prompt may open the reasoning, which the template strips from finished turns (DeepSeek-R1),
    or end with empty reasoning (Gemma 4). Or the template puts the system prompt only into the last
    question, so it is missing from a chat that ends with an answer (Mistral).
    tail: what the template writes after an answer.
    """
    message, opened = messages[-1], marks.opened(before)
    content = message.get("content")
    if not isinstance(content, str):
        return ""
    apart = reasoning_of(message)
    if apart and opened:
        content = f"{apart.strip()}\n{marks.closing(opened)}\n\n{content.strip()}"
    parts = marks.split(content.strip())
    stem = after.removesuffix(tail)
    if not parts.answer or not after.endswith(tail) or not stem.rstrip().endswith(parts.answer):
        return ""
    start = stem.rstrip().removesuffix(parts.answer)
    tail = after[len(stem.rstrip()) :]
    if opened:
        turn_text = content.strip().removeprefix(opened.rstrip()).lstrip()
        return turn_text + tail if parts.reasoning else ""
    question = str(messages[-2].get("content")) if len(messages) > 1 else ""
    header = start[start.rfind(question) :] if question and question in start else start
    prompt = marks.without_empty(before)
    if parts.reasoning or not prompt.rstrip().endswith(header.rstrip()):
        return ""
    space = "" if prompt.endswith(header) else header[len(header.rstrip()) :]
    return space + parts.answer + tail


def _reject_two_reasonings(conversation: Conversation, index: int, written: str) -> None:
    """Raise DataError if the template puts empty reasoning before the turn's own in <think>."""
    content, closing = conversation.messages[index].get("content"), THINK[1]
    if not isinstance(content, str) or not content.lstrip().startswith(THINK[0]):
        return
    if written.count(closing) > content.count(closing):
        raise DataError(
            f"The chat template writes a reasoning block before the reasoning of message {index} "
            f"(...{written[:60]!r})",
            fix=f"remove the reasoning from the message's content, or move it to a key that the "
            f"template reads ({', '.join(KEYS)})",
        )


def _without_system(conversation: Conversation, index: int, after: str, tokenizer: Any) -> str:
    """What the model generates if the turn is a tool call and the template omits the system prompt
    from finished turns; or ""."""
    if index < 2 or conversation.messages[0]["role"] != "system":
        return ""
    rest = replace(conversation, messages=conversation.messages[1:])
    try:
        bare = _render(rest, index - 1, True, tokenizer)
    except DataError:
        return ""
    if not after.startswith(bare) or len(after) == len(bare):
        return ""
    return after[len(bare) :]


def _next_token(
    end: TurnEnd, conversation: Conversation, index: int, after: str, tokenizer: Any
) -> str:
    """The token that ends a turn if the template does not write one after it."""
    if end.stops and index + 1 < len(conversation.messages):
        more = _render(conversation, index + 2, False, tokenizer).removeprefix(after).lstrip()
        for token in end.stops:
            if more.startswith(token):
                return token
    return end.text


def _no_border(
    conversation: Conversation, index: int, before: str, after: str, marks: Marks
) -> DataError:
    if before.startswith(after):
        return DataError(
            f"The chat template leaves out message {index} (assistant): the rendered chat ends "
            f"...{after[-60:]!r}",
            fix="use a template that renders all assistant turns, including tool calls; write the "
            "turn into `content` as the model should generate it; or remove the row",
        )
    pairs = enumerate(zip(before, after, strict=False))
    same = next((at for at, (one, other) in pairs if one != other), len(before))
    what = (
        "The chat template does not begin an assistant turn with its own generation prompt, so "
        f"the model's input and output cannot be separated (message {index}: the input has "
        f"...{_around(before, same)!r} where the complete turn has ...{_around(after, same)!r})"
    )
    fix = (
        "use a template whose add_generation_prompt writes the header of an assistant turn, or "
        "write `prompt` and `completion` as strings"
    )
    opened = marks.opened(before)
    if conversation.messages[index - 1]["role"] == "assistant" and not opened:
        what = (
            f"Message {index} is an assistant turn right after another one, and the chat template "
            "renders the two in a way that no model would generate"
        )
        fix = (
            "join the two into one message; if the first is a tool call, write its result (role "
            "`tool`) between them"
        )
    elif opened:
        mark = opened.rstrip()
        fix = (
            f"begin the turn with its reasoning ({mark}...{marks.closing(opened)}; for synthesized "
            f"text, set synthesize.reasoning: keep), or use a template whose add_generation_prompt "
            f"does not open {mark}"
        )
    return DataError(what, fix=fix)


def _around(text: str, position: int) -> str:
    return text[max(0, position - 40) : position + 40]


def _render(conversation: Conversation, end: int, generate: bool, tokenizer: Any) -> str:
    key, marks = template_form(tokenizer).reasoning_key, Marks.own(tokenizer)
    try:
        return render_chat(
            tokenizer,
            [_with_own_marks(one, key, marks) for one in conversation.messages[:end]],
            tools=conversation.tools,
            generation_prompt=generate,
        )
    except TEMPLATE_ERRORS as error:
        if isinstance(error, TemplateSyntaxError):
            raise DataError(
                f"The chat template is damaged: {error}",
                where=getattr(tokenizer, "name_or_path", None),
                fix="copy the tokenizer's chat_template.jinja, or its tokenizer_config.json, again",
            ) from error
        roles = ", ".join(message["role"] for message in conversation.messages)
        raise DataError(
            f"The chat template rejects the row: {error} (roles: {roles})",
            fix="write the messages in the order and with the fields that the template expects",
        ) from error


def _with_own_marks(message: Message, key: str | None, marks: Pair | None) -> Message:
    """Move reasoning in <think> to where the template expects it: under a key, or between different
    tags."""
    content = message.get("content")
    if message["role"] != "assistant" or not isinstance(content, str) or not (key or marks):
        return message
    if not content.lstrip().startswith(THINK[0]) or reasoning_of(message):
        return message
    parts = MARKS.split(content.strip())
    if not parts.reasoning:
        return message
    if key is not None:
        return {**message, "content": parts.answer, key: parts.reasoning}
    assert marks is not None
    return {**message, "content": f"{marks[0]}{parts.reasoning}{marks[1]}{parts.answer}"}

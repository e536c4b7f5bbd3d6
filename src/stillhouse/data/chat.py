"""The loss mask of a conversation, found by rendering prefixes with the chat template.

A chat template is a program: it does not say which characters belong to which turn. But
`render(messages[:i], add_generation_prompt=True)` is the model's input before it writes turn i, and
`render(messages[:i+1])` is the text after it. If both are prefixes of the whole rendering, the
characters between them are exactly what the model has to write.

Templates that rewrite earlier turns (most of those that strip earlier reasoning) break the second
condition for all but the last turns. Such a turn becomes a row of its own, rendered as the model
would see it at that moment, so that each turn is trained on once and in its true context.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from stillhouse.data.documents import Conversation
from stillhouse.errors import DataError


@dataclass(frozen=True)
class Piece:
    """Consecutive characters of a row, all of them supervised or none."""

    text: str
    supervised: bool


@dataclass(frozen=True)
class _Turn:
    """An assistant turn: the rendering before it, with its header, and after it."""

    before: str
    after: str


def render_conversation(conversation: Conversation, tokenizer: Any) -> list[list[Piece]]:
    """The rows of one conversation, each as pieces of text.

    Usually one row; more if the template rewrites earlier turns. A leading assistant turn has no
    input before it: it is context only. Raises DataError if the tokenizer has no template, the
    template rejects the messages, or no token would be supervised.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise DataError(
            "The tokenizer has no chat template, so messages cannot be rendered",
            where=conversation.where,
            fix="use an instruction-tuned model, put a chat_template.jinja beside its "
            "tokenizer.json, or give `prompt` and `completion` as strings",
        )
    first = max(1, conversation.supervised_from)
    turns = [
        index
        for index, message in enumerate(conversation.messages)
        if message["role"] == "assistant" and index >= first
    ]
    if not turns:
        raise DataError(
            "The row has no assistant turn to train on: 0% of its tokens are supervised",
            where=conversation.where,
            fix="remove the row, or check its roles: `assistant` turns after the first message "
            "are supervised",
        )
    rendered = [_render_turn(conversation, index, tokenizer) for index in turns]
    rows = []
    while rendered:
        whole = rendered[-1].after
        shared = [t for t in rendered if whole.startswith(t.before) and whole.startswith(t.after)]
        rows.append(_pieces(shared, tokenizer))
        rendered = [turn for turn in rendered if turn not in shared]
    return rows[::-1]


def _render_turn(conversation: Conversation, index: int, tokenizer: Any) -> _Turn:
    before = _render(conversation, index, True, tokenizer)
    after = _render(conversation, index + 1, False, tokenizer)
    if after.startswith(before) and len(after) > len(before):
        return _Turn(before, after)
    raise DataError(
        "The chat template does not begin an assistant turn with its own generation prompt, so "
        f"the model's input and output cannot be separated (message {index}: the input ends "
        f"...{before[-60:]!r}, and the turn ends ...{after[-60:]!r})",
        where=conversation.where,
        fix="use a template whose add_generation_prompt is the header of an assistant turn, or "
        "give `prompt` and `completion` as strings",
    )


def _render(conversation: Conversation, end: int, generate: bool, tokenizer: Any) -> str:
    import jinja2

    try:
        return tokenizer.apply_chat_template(
            [dict(message) for message in conversation.messages[:end]],
            tools=None if conversation.tools is None else list(conversation.tools),
            add_generation_prompt=generate,
            tokenize=False,
        )
    except (jinja2.TemplateError, AttributeError, LookupError, TypeError, ValueError) as error:
        roles = ", ".join(message["role"] for message in conversation.messages)
        raise DataError(
            f"The chat template rejects the row: {error} (roles: {roles})",
            where=conversation.where,
            fix="use the order and fields of messages that the template expects",
        ) from error


def _pieces(turns: Sequence[_Turn], tokenizer: Any) -> list[Piece]:
    """Context and supervised text alternately, up to the end of the last supervised text."""
    pieces: list[Piece] = []
    whole, done = turns[-1].after, 0
    for turn in turns:
        end = len(turn.before) + _written(turn.after[len(turn.before) :], tokenizer)
        pieces.append(Piece(whole[done : len(turn.before)], False))
        pieces.append(Piece(whole[len(turn.before) : end], True))
        done = end
    pieces.append(Piece(whole[done:], False))
    return [piece for piece in pieces if piece.text]


def _written(text: str, tokenizer: Any) -> int:
    """Characters of `text` up to and with its end-of-turn token.

    Templates put a newline after that token, when generation has already stopped.
    """
    trimmed = text.rstrip()
    ends = any(trimmed.endswith(str(token)) for token in tokenizer.added_tokens_encoder)
    return len(trimmed) if ends else len(text)

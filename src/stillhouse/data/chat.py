"""Finds the loss mask of a conversation by rendering prefixes with the chat template.

A chat template is a program: it does not report which characters belong to which turn. But
`render(messages[:i], add_generation_prompt=True)` is the model's input before it generates turn i,
and `render(messages[:i+1])` is the text after it. If both are prefixes of the full rendering, the
characters between them are exactly what the model has to generate.

Templates that rewrite earlier turns (for example, to strip earlier reasoning) break the second
condition for all but the last turns. Such a turn becomes a separate row, rendered as the model
would see it at that point, so each turn is trained on once and in its true context.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from stillhouse.data.call_ids import IDS_CHANGED, written_ids
from stillhouse.data.chat_formats import is_blank, joined_text
from stillhouse.data.chat_proof import prove_context, prove_turn
from stillhouse.data.chat_turns import Turn, render_turn
from stillhouse.data.control_tokens import CONTROL_TEXT, ControlTokens, Piece
from stillhouse.data.documents import Conversation
from stillhouse.data.reasoning import reasoning_of
from stillhouse.data.template_form import template_form
from stillhouse.errors import DataError


@dataclass(frozen=True)
class RenderedChat:
    """A rendered chat. rows: the pieces of text of each row. notes: parts omitted on purpose."""

    rows: list[list[Piece]]
    notes: tuple[str, ...] = ()


def render_conversation(
    conversation: Conversation, tokenizer: Any, *, control_tokens: bool = False
) -> RenderedChat:
    """Render the rows of one conversation.

    control_tokens: read strings of control tokens in messages as tokens. There is usually one row,
    and more if the template rewrites earlier turns. An assistant turn that begins the chat has no
    input, so it is context only. Raises DataError if the tokenizer has no template, the template
    rejects the messages or leaves out a part of them, or no token would be supervised.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise DataError(
            "The tokenizer has no chat template, so messages cannot be rendered",
            fix="use an instruction-tuned model, put a chat_template.jinja next to its "
            "tokenizer.json, or write `prompt` and `completion` as strings",
        )
    form = template_form(tokenizer, tools=bool(conversation.tools))
    learned = _learned(conversation)
    fitted = replace(
        conversation,
        messages=tuple(form.fit(conversation.messages)),
        tools=form.fit_tools(conversation.tools),
    )
    hidden = fitted if control_tokens else _hide(fitted, form.control_tokens)
    reveal = (lambda text: text) if hidden is fitted else form.control_tokens.reveal
    try:
        turns = [render_turn(hidden, index, tokenizer) for index in learned]
    except DataError:
        if hidden is not fitted:  # the error should show the text, not the placeholders
            [render_turn(fitted, index, tokenizer) for index in learned]
        raise
    for index, turn in zip(learned, turns, strict=True):
        written = reveal(turn.written[len(turn.before) :])
        prove_turn(fitted.messages[index], index, written, form)
    used = fitted.messages[: learned[-1] + 1]
    rendering = reveal(turns[-1].after)
    prompts = {index: reveal(t.before) for index, t in zip(learned, turns, strict=True)}
    notes = prove_context(used, fitted.tools, rendering, form, prompts)
    notes += _notes(conversation, learned, hidden is not fitted)
    if _ids_changed(conversation.messages, fitted.messages, rendering):
        notes.append(IDS_CHANGED)
    rows: list[list[Piece]] = []
    while turns:
        last = turns[-1].after
        shared = [t for t in turns if last.startswith(t.before) and last.startswith(t.written)]
        pieces = _pieces(shared)
        if hidden is not fitted:
            pieces = [part for piece in pieces for part in form.control_tokens.divide(piece)]
        rows.append(pieces)
        turns = [turn for turn in turns if turn not in shared]
    return RenderedChat(rows[::-1], tuple(notes))


def _learned(conversation: Conversation) -> list[int]:
    """Indices of the supervised turns. Raises DataError if there are none or one is empty."""
    first = max(1, conversation.supervised_from)
    turns = [
        index
        for index, message in enumerate(conversation.messages)
        if message["role"] == "assistant"
        and index >= first
        and index not in conversation.context_only
    ]
    if not turns:
        answered = any(message["role"] == "assistant" for message in conversation.messages)
        raise DataError(
            "The row has no assistant turn to train on: 0% of its tokens are supervised",
            fix="remove the row, or check its roles: `assistant` turns after the first message "
            "are supervised, unless their weight is 0"
            + ("" if answered else "; list prompts for a teacher in synthesize.prompts"),
        )
    for index in turns:
        message = conversation.messages[index]
        empty = is_blank(joined_text(message.get("content")))
        if empty and not message.get("tool_calls") and not reasoning_of(message):
            raise DataError(
                f"`messages[{index}]` is an empty assistant turn: it has nothing to train on",
                fix="remove the row, or fill the turn",
            )
    return turns


def _hide(chat: Conversation, control: ControlTokens) -> Conversation:
    """Replace strings of control tokens by placeholders; the same object if there are none."""
    messages = control.hide_messages(chat.messages)
    if messages is None and not control.found(chat.tools):
        return chat
    tools = None if chat.tools is None else tuple(control.hide(chat.tools))
    return replace(chat, messages=tuple(messages or chat.messages), tools=tools)


def _ids_changed(
    given: Sequence[Mapping[str, Any]], fitted: Sequence[Mapping[str, Any]], rendering: str
) -> bool:
    """Whether the rendering contains a tool call id that the row does not have."""
    pairs = zip(written_ids(given), written_ids(fitted), strict=True)
    return any(new != old and str(new) in rendering for old, new in pairs)


def _notes(conversation: Conversation, learned: Sequence[int], hidden: bool) -> list[str]:
    notes = [CONTROL_TEXT] if hidden else []
    if learned[-1] + 1 < len(conversation.messages):
        notes.append("messages after the last supervised turn are left out")
    if conversation.messages[0]["role"] == "assistant" and not conversation.supervised_from:
        notes.append("an assistant turn that begins a chat is context only")
    return notes


def _pieces(turns: Sequence[Turn]) -> list[Piece]:
    """Alternate context and supervised text, up to the end of the rendering."""
    pieces: list[Piece] = []
    rendering, done = turns[-1].after, 0
    for turn in turns:
        pieces.append(Piece(rendering[done : len(turn.before)], False))
        pieces.append(Piece(rendering[len(turn.before) : len(turn.written)], True))
        done = len(turn.written)
    pieces.append(Piece(rendering[done:], False))
    return [piece for piece in pieces if piece.text]

"""Tokenizes prompts. Strings of control tokens in them are read as text, as in training text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from stillhouse.data.chat_template import render_chat
from stillhouse.data.control_tokens import Piece
from stillhouse.data.template_form import template_form
from stillhouse.data.tokenize_rows import encode_pieces, leading_tokens


def chat_ids(tokenizer: Any, messages: Sequence[Mapping[str, Any]]) -> list[int]:
    """Tokenize a chat up to where the model answers. Raises the errors of `render_chat`."""
    form = template_form(tokenizer)
    fitted = form.fit(messages)
    hidden = form.control_tokens.hide_messages(fitted)
    prompt = Piece(render_chat(tokenizer, hidden or fitted, generation_prompt=True), False)
    pieces = [prompt] if hidden is None else list(form.control_tokens.divide(prompt))
    ((ids, _),) = encode_pieces([pieces], tokenizer)
    return [int(one) for one in ids]


def text_ids(tokenizer: Any, text: str, *, start: bool = False) -> list[int]:
    """Tokenize a text. start: add the tokens that the tokenizer puts before every text."""
    control = template_form(tokenizer).control_tokens
    found = control.found(text)
    pieces = list(control.plain(text, False)) if found else [Piece(text, False)]
    ((ids, _),) = encode_pieces([pieces], tokenizer)
    before = leading_tokens(tokenizer) if start else ()
    return [int(one) for one in (*before, *ids)]

"""Rendered chats are parsed into parts and written in the format of another template."""

from __future__ import annotations

from typing import Any

import pytest

from stillhouse.data.chat_frames import chat_frames
from tests import chat_toys
from tests.chat_toys import CHATML, chat

LLAMA = (
    "{% for m in messages %}<|header|>{{ m.role }}<|/header|>\n\n{{ m.content }}<|eot|>{% endfor %}"
)
WITH_DEFAULT = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
    + CHATML
)
CHATS = [
    chat("one", "two"),
    chat("one", "two", "three", "four"),
    [{"role": "system", "content": "be short"}, *chat("one", "two")],
]


@pytest.mark.parametrize("messages", CHATS)
@pytest.mark.parametrize("template", [CHATML, WITH_DEFAULT, LLAMA])
def test_parsing_a_rendered_chat_recovers_its_messages(
    template: str, messages: list[dict[str, Any]]
) -> None:
    words = chat_toys.tokenizer(template)
    text = words.apply_chat_template(messages, tokenize=False)
    parts = chat_frames(words).parse(text)
    assert "".join(part.text for part in parts) == text
    contents = [{"role": part.role, "content": part.text} for part in parts if part.role]
    assert contents == messages


@pytest.mark.parametrize("messages", CHATS)
def test_a_parsed_chat_is_written_as_the_other_template_renders_it(
    messages: list[dict[str, Any]],
) -> None:
    one, other = chat_toys.tokenizer(CHATML), chat_toys.tokenizer(LLAMA)
    parts = chat_frames(one).parse(one.apply_chat_template(messages, tokenize=False))
    assert parts is not None
    written = chat_frames(other).write(parts)
    assert "".join(part.text for part in written) == other.apply_chat_template(
        messages, tokenize=False
    )


def test_text_that_the_template_did_not_render_is_not_parsed() -> None:
    frames = chat_frames(chat_toys.tokenizer(CHATML))
    assert frames.parse("the cat") is None
    assert frames.parse("<|im_start|>user\nhello") is not None  # cut off
    rendered = "<|im_start|>user\none<|im_end|>\n<|im_start|>assistant\ntwo"
    assert frames.parse(rendered + "<|im_end|>\n<|im_start|>tool\nthree<|im_end|>\n") is None


def test_a_template_that_writes_later_turns_differently_has_no_frames() -> None:
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }} {{ loop.index }}\n{{ m.content }}"
        "<|im_end|>\n{% endfor %}"
    )
    assert chat_frames(chat_toys.tokenizer(template)) is None
    assert chat_frames(chat_toys.tokenizer(None)) is None

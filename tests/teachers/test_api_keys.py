"""Keys are removed from text in every spelling that a server may use."""

from __future__ import annotations

import json
from html import escape
from urllib.parse import quote

import pytest

from stillhouse.teachers.api_keys import redacted

KEY = "sk-a/b+c=1234567890&<x>~"


@pytest.mark.parametrize(
    "written",
    [
        KEY,
        json.dumps(KEY)[1:-1],
        KEY.replace("/", r"\/"),
        KEY.replace("/", r"\\/"),
        "".join(f"\\u{ord(character):04X}" for character in KEY),
        quote(KEY),
        quote(KEY, safe=""),
        escape(KEY),
        "".join(f"&#{ord(character)};" for character in KEY),
        "".join(f"&#X{ord(character):04X};" for character in KEY),
        "".join(f"\\x{ord(character):02x}" for character in KEY),
        "".join(f"%25{ord(character):02x}" for character in KEY),
        KEY[:14],
    ],
)
def test_every_spelling_of_the_key_is_removed(written: str) -> None:
    assert redacted(f"the key {written}. It is wrong: {written}", KEY) == (
        "the key [key]. It is wrong: [key]"
    )


def test_other_text_is_unchanged() -> None:
    text = 'sk-a/b is no key, and neither is "sk-..."'
    assert redacted(text, KEY) == text
    assert redacted(text, None) == text


def test_a_short_key_is_removed_literally() -> None:
    assert redacted("the key EMPTY", "EMPTY") == "the key [key]"

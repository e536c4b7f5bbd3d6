"""The text that each token adds to the decoded text."""

from __future__ import annotations

import pytest

from stillhouse.generation.own_text import token_texts
from tests import tiny


@pytest.mark.parametrize(
    "text", ["", "plain words", "na\u00efve \U0001f600\u4e2d\u6587", "the the"]
)
def test_the_texts_of_all_tokens_form_the_decoded_text(text: str) -> None:
    tokenizer = tiny.merging_tokenizer()
    ids = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    texts = token_texts(tokenizer, ids)
    assert len(texts) == len(ids)
    assert "".join(texts) == f"{text}<|end|>"


def test_a_character_of_several_tokens_belongs_to_the_last_one() -> None:
    tokenizer = tiny.tokenizer()
    assert token_texts(tokenizer, tokenizer("a\u00efb")["input_ids"]) == ["a", "", "\u00ef", "b"]


def test_invalid_bytes_at_the_end_stay_visible() -> None:
    tokenizer = tiny.tokenizer()
    ids = tokenizer("\u00ef")["input_ids"][:1]
    assert token_texts(tokenizer, ids) == ["\N{REPLACEMENT CHARACTER}"]

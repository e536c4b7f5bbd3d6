"""Texts and prompts begin with every token that the tokenizer writes before a text, as context."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing

from stillhouse.data.chat_prompt import text_ids
from stillhouse.data.packing import fill_windows, plan_single
from stillhouse.data.shift import IGNORED

from ..data.learned import rows_of, shown
from ..data.toys import byte_level


def glm(single: str = "[gMASK] <sop> $A") -> Any:
    """A tokenizer like GLM 4's: every text begins with two tokens, neither of which is BOS."""
    tokenizer = byte_level()
    tokenizer.add_special_tokens({"additional_special_tokens": ["[gMASK]", "<sop>"]})
    tokens = ["[gMASK]", "<sop>", "<s>", "<|im_end|>"]
    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single=single,
        pair=f"{single} $B",
        special_tokens=[(token, tokenizer.convert_tokens_to_ids(token)) for token in tokens],
    )
    return tokenizer


def test_a_text_begins_with_both_tokens_and_neither_is_learned() -> None:
    tokenizer = glm()
    (row,) = rows_of({"text": "The cat sees a tree."}, tokenizer)
    assert tokenizer.decode(row.ids) == "[gMASK]<sop>The cat sees a tree.<|im_end|>"
    plan = plan_single([len(row.ids)], [True], len(row.ids))
    (window,) = fill_windows(plan, lambda _: (row.ids, row.supervised), len(row.ids), 0)
    labels = [token for token in window["labels"].tolist() if token != IGNORED]
    assert tokenizer.decode(labels) == "The cat sees a tree.<|im_end|>"


def test_a_prompt_omits_the_token_that_the_tokenizer_writes_after_texts() -> None:
    """Tokenizers saved with add_eos_token write EOS; an answer must not follow it."""
    tokenizer = glm("[gMASK] <sop> $A <|im_end|>")
    for text in ("The cat", "The <|im_end|> cat"):
        (row,) = rows_of({"prompt": text, "completion": " sees."}, tokenizer, control_tokens="text")
        prompt = text_ids(tokenizer, text, start=True)
        assert prompt == row.ids[~row.supervised].tolist()
        assert tokenizer.decode(prompt) == f"[gMASK]<sop>{text}"


def test_a_prompt_begins_with_both_tokens() -> None:
    row = {"prompt": "The cat", "completion": " sees a tree."}
    assert shown(row, glm()) == "[gMASK]<sop>The cat[[ sees a tree.<|im_end|>]]"


@pytest.mark.parametrize(
    ("single", "expected"),
    [
        ("<s> $A <|im_end|>", "<s>The cat<|im_end|>"),  # writes EOS itself
        ("$A <|im_end|>", "The cat<|im_end|>"),
        ("$A", "The cat<|im_end|>"),
        ("[gMASK] <sop> <s> $A", "[gMASK]<sop><s>The cat<|im_end|>"),
    ],
)
def test_eos_is_written_once_whatever_the_tokenizer_writes(single: str, expected: str) -> None:
    tokenizer = glm(single)
    (row,) = rows_of({"text": "The cat"}, tokenizer)
    assert tokenizer.decode(row.ids) == expected


def test_a_chat_begins_with_its_template_without_the_two_tokens() -> None:
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    assert shown(row, glm()).startswith("<|im_start|>user")

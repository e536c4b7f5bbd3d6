"""Teacher and student must end turns with the same token; different templates are reported."""

from __future__ import annotations

import pytest

from stillhouse.errors import ModelError
from stillhouse.training.turn_agreement import differing_template, require_same_end
from tests import tiny


def test_equal_tokenizers_agree() -> None:
    require_same_end(tiny.tokenizer(), tiny.tokenizer())
    assert differing_template(tiny.tokenizer(), tiny.tokenizer()) is None


def test_models_that_stop_at_different_tokens_are_rejected() -> None:
    other = tiny.tokenizer()
    other.chat_template = tiny.CHAT_TEMPLATE.replace("<|end|>", "<|system|>")
    other.eos_token = "<|system|>"
    with pytest.raises(ModelError, match=r"<\|end\|>, but the teacher with <\|system\|>"):
        require_same_end(tiny.tokenizer(), other)
    with pytest.raises(ModelError, match="never learn to end its answers"):
        require_same_end(other, tiny.tokenizer())
    require_same_end(None, other)


def test_a_different_template_is_described() -> None:
    other = tiny.tokenizer()
    other.chat_template = tiny.CHAT_TEMPLATE.replace("<|assistant|>", "<|assistant|>: ")
    assert "to the teacher" in (differing_template(tiny.tokenizer(), other) or "")
    other.chat_template = None
    assert differing_template(tiny.tokenizer(), other) == "the teacher has no chat template"

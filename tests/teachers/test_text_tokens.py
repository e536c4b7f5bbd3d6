"""The bytes of tokens: joined, they are the text."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from stillhouse.errors import ModelError
from stillhouse.teachers.text_tokens import byte_of_character, token_bytes
from tests import tiny

TEXT = "the cat ÷ häß 猫\n\t 🐈  the end"


def with_byte_fallback() -> PreTrainedTokenizerFast:
    """Like Llama 2, Mistral, and Gemma: ▁ for a space, and <0xNN> for bytes without a token."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"thecand", "ä", "▁t"]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    core = Tokenizer(
        models.BPE(vocabulary, [("▁", "t")], unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    core.normalizer = normalizers.Replace(" ", "▁")
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback()])
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", eos_token="</s>")


@pytest.mark.parametrize("make", [tiny.tokenizer, tiny.merging_tokenizer, with_byte_fallback])
def test_the_bytes_of_the_tokens_of_a_text_join_to_the_text(
    make: Callable[[], PreTrainedTokenizerFast],
) -> None:
    tokenizer = make()
    known = token_bytes(tokenizer)
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    assert len(ids) > 10
    assert b"".join(known[i] for i in ids) == TEXT.encode()
    assert known[tokenizer.eos_token_id] == tokenizer.eos_token.encode()
    assert set(known) == set(tokenizer.get_vocab().values())


def test_every_byte_has_a_different_character() -> None:
    known = byte_of_character()
    assert sorted(known.values()) == list(range(256))
    assert set(known) == set(pre_tokenizers.ByteLevel.alphabet())


def test_a_tokenizer_of_words_is_rejected() -> None:
    core = Tokenizer(models.WordLevel({"the": 0, "[UNK]": 1}, unk_token="[UNK]"))
    with pytest.raises(ModelError, match="does not define the bytes"):
        token_bytes(PreTrainedTokenizerFast(tokenizer_object=core))

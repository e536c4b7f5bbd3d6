"""Bits per byte: a measure of text that does not depend on the tokenizer."""

from __future__ import annotations

import math

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from stillhouse.data.data import Data
from stillhouse.evaluation.evaluate import evaluate_models
from stillhouse.evaluation.measuring import bits_per_byte, supervised_bytes
from stillhouse.evaluation.results import Fidelity
from tests import tiny

TEXTS = ["the cat sees 猫", "a dog likes the house"]


def test_bytes_are_those_of_the_predicted_text() -> None:
    """The first token of each document is not predicted; here it is one byte."""
    data = Data.build(TEXTS, tiny.tokenizer(), heldout=["the end"], context=64)
    expected = sum(len(text.encode()) - 1 for text in TEXTS)
    assert supervised_bytes(tiny.tokenizer(), data.train) == expected


def test_a_uniform_model_of_bytes_needs_log_v_bits_for_each_token() -> None:
    found = Fidelity(260.0, 0.0, 0.0, 0.0, tokens=30)
    assert bits_per_byte(found, 28) == pytest.approx(30 * math.log2(260) / 28)
    assert bits_per_byte(found, 0) is None
    assert bits_per_byte(found, None) is None


def test_bits_per_byte_agree_with_the_loss_of_transformers() -> None:
    words, model = tiny.tokenizer(), tiny.llama()
    data = Data.build(["one", "two"], words, heldout=TEXTS[:1], context=64)
    found = evaluate_models({"teacher": model}, words, data.heldout, vocabulary=len(words))
    ids = torch.tensor([[*words(TEXTS[0])["input_ids"], words.eos_token_id]])
    with torch.no_grad():
        loss = float(model(ids, labels=ids).loss) * (ids.shape[1] - 1)
    expected = loss / math.log(2) / (len(TEXTS[0].encode()) - 1)
    assert found.models[0].fidelity.bits_per_byte == pytest.approx(expected, rel=1e-4)


def test_bytes_are_unknown_if_tokens_do_not_decode_to_bytes() -> None:
    core = Tokenizer(models.WordLevel({"the": 0, "[UNK]": 1}, unk_token="[UNK]"))
    words = PreTrainedTokenizerFast(tokenizer_object=core)
    data = Data.build(TEXTS, tiny.tokenizer(), heldout=["the end"], context=64)
    assert supervised_bytes(words, data.train) is None

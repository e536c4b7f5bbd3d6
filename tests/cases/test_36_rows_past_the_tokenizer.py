"""A student has no embedding rows for ids beyond its tokenizer, so it gives them no probability."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader
from transformers import AutoModelForCausalLM

import stillhouse
from stillhouse.students.student import Student
from stillhouse.teachers.load_model import load_model
from tests import tiny
from tests.gguf_models import MODELS, save

ROWS = 320
"""Rows of the teacher's embedding. As in Qwen models, they exceed the tokenizer's tokens."""

WORDS = tiny.merging_tokenizer()

STARTS: dict[str, dict[str, Any]] = {
    "random": {"start": "random", "overrides": {"num_hidden_layers": 2}},
    "pretrained": {"start": "pretrained"},
    "pruned": {"start": "pruned", "ffn_size": 32, "calibration_tokens": 256},
}


@pytest.mark.run
@pytest.mark.parametrize("start", STARTS)
def test_an_exported_model_has_as_many_rows_as_tokens(tmp_path: Path, start: str) -> None:
    raw = tiny.recipe(tmp_path)
    tiny.llama(vocab_size=ROWS).save_pretrained(tmp_path / "teacher")
    WORDS.save_pretrained(tmp_path / "teacher")
    raw["student"] = dict(STARTS[start])
    if start == "pretrained":
        raw["student"]["model"] = str(tmp_path / "teacher")
    raw["export"] = {"formats": ["safetensors", "gguf-q8_0"]}
    assert stillhouse.run(raw) is not None
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert model.config.vocab_size == len(WORDS)
    assert model.get_input_embeddings().weight.shape[0] == len(WORDS)
    assert model.get_output_embeddings().weight.shape[0] == len(WORDS)
    [file] = (tmp_path / "run").glob("gguf-q8_0/*.gguf")
    assert len(GGUFReader(file).fields["tokenizer.ggml.tokens"].contents()) == len(WORDS)


@pytest.mark.parametrize("name", ["llama, untied", "qwen3_moe", "gemma2", "phi3", "granite"])
def test_the_logits_of_the_remaining_rows_are_unchanged(tmp_path: Path, name: str) -> None:
    model = save(tmp_path / "padded", name, vocab_size=ROWS)
    student = Student.load(tmp_path / "padded")
    student.save(tmp_path / "saved")
    saved = load_model(tmp_path / "saved", dtype=torch.float32)
    ids = torch.randint(4, 200, (1, 30), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(input_ids=ids).logits[..., : len(WORDS)]
        assert torch.equal(saved(input_ids=ids).logits, expected)
        assert torch.equal(student.model(input_ids=ids).logits, expected)
    assert MODELS[name][0] == saved.config.model_type


def test_a_model_with_a_row_for_each_token_is_unchanged(tmp_path: Path) -> None:
    student = Student(tiny.llama(), tiny.tokenizer())
    weight = student.model.get_input_embeddings().weight
    student.save(tmp_path)
    assert student.model.get_input_embeddings().weight is weight


def test_a_random_start_has_a_row_for_each_token() -> None:
    config = tiny.llama_config(vocab_size=ROWS)
    assert Student.random(config, WORDS).model.config.vocab_size == len(WORDS)
    assert Student.random(config, WORDS, vocab_size=300).model.config.vocab_size == 300
    assert Student.random(config).model.config.vocab_size == ROWS


def test_rows_up_to_the_padding_id_are_kept(tmp_path: Path) -> None:
    """Otherwise, a padding id beyond the tokenizer would have no row in the embedding."""
    student = Student(tiny.llama(vocab_size=ROWS, pad_token_id=300), tiny.tokenizer())
    student.save(tmp_path)
    assert load_model(tmp_path, dtype=torch.float32).config.vocab_size == 301

"""Loading a GGUF file restores the model, including scaled rotary embeddings and biases."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from stillhouse.export.gguf_file import FORMATS, write_gguf
from stillhouse.teachers.load_model import load_model
from stillhouse.teachers.model_source import resolve_model
from tests import tiny

ROPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "linear": {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}},
    "llama3": {
        "rope_parameters": {
            "rope_type": "llama3",
            "factor": 32.0,
            "rope_theta": 5e5,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
    "yarn": {
        "rope_parameters": {
            "rope_type": "yarn",
            "factor": 4.0,
            "rope_theta": 1e4,
            "original_max_position_embeddings": 128,
        }
    },
    "biases": {"attention_bias": True},
}


@pytest.mark.parametrize("name", ROPES)
def test_a_model_loaded_from_gguf_computes_the_original_logits(tmp_path: Path, name: str) -> None:
    words = tiny.merging_tokenizer()
    made = tiny.llama(vocab_size=len(words), **ROPES[name])
    for key, weight in made.named_parameters():
        if key.endswith("bias"):
            weight.data.normal_(0, 0.5)
    made.save_pretrained(tmp_path / "model")
    words.save_pretrained(tmp_path / "model")
    write_gguf(tmp_path / "model", tmp_path / "model.gguf", FORMATS["f32"], name=name)
    found = resolve_model(str(tmp_path / "model.gguf"), base=tmp_path, cache=tmp_path)
    converted = load_model(found.path, dtype=torch.float32)
    ids = torch.tensor([words(tiny.text(12))["input_ids"][:160]])
    with torch.no_grad():
        assert_close(converted(ids).logits, made(ids).logits, rtol=1e-5, atol=1e-5)

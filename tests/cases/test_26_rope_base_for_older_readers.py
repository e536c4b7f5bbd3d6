"""An exported configuration also stores the base of rotary embeddings under its old key."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from stillhouse.export.checkpoint import _save
from tests import tiny
from tests.gguf_models import LLAMA_3

DEFAULT = {"rope_type": "default", "rope_theta": 500000.0}


def as_transformers_4(config: dict[str, object]) -> LlamaConfig:
    """Reads only the old keys, as transformers 4 does: without rope_theta, the base is 10,000."""
    read = {key: value for key, value in config.items() if key != "rope_parameters"}
    read.setdefault("rope_theta", 10000.0)
    return LlamaConfig.from_dict(read)


def test_an_older_reader_computes_the_same_logits(tmp_path: Path) -> None:
    ids = torch.tensor([tiny.tokenizer()(tiny.text(12))["input_ids"][:160]])
    for name, rope in (("default", DEFAULT), ("llama3", LLAMA_3)):
        tiny.save_model(tmp_path / name / "student", rope_parameters=rope)
        _save(tmp_path / name / "student", tmp_path / name / "out", torch.float32)
        config = json.loads((tmp_path / name / "out" / "config.json").read_text())
        assert config["rope_theta"] == 500000.0
        new = AutoModelForCausalLM.from_pretrained(tmp_path / name / "out").eval()
        old = LlamaForCausalLM(as_transformers_4(config)).eval()
        old.load_state_dict(new.state_dict())
        with torch.no_grad():
            assert torch.equal(new(ids).logits, old(ids).logits)
        assert new.config.rope_parameters == rope

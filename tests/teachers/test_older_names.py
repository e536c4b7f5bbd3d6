"""Saved files are read alike by transformers 5 and by programs with the names of version 4."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaTokenizer,
    Phi3Config,
)

from stillhouse.students.student import Student
from stillhouse.teachers.load_model import load_config
from stillhouse.teachers.older_names import save_tokenizer, with_older_names, write_older_names
from tests import tiny
from tests.teachers.toys import CONFIGS, SIZES, tiny_model

LONG = {
    "rope_type": "longrope",
    "rope_theta": 50000.0,
    "short_factor": [1.0, 1.5],
    "long_factor": [2.0, 4.0],
    "original_max_position_embeddings": 64,
}


def saved(config: Any) -> dict[str, Any]:
    return with_older_names(json.loads(config.to_json_string()))


@pytest.mark.parametrize(
    ("rope", "scaling"),
    [
        ({"rope_type": "default", "rope_theta": 5e5}, None),
        (
            {"rope_type": "linear", "rope_theta": 5e5, "factor": 4.0},
            {"rope_type": "linear", "factor": 4.0},
        ),
        (
            {
                "rope_type": "yarn",
                "rope_theta": 5e5,
                "factor": 4.0,
                "original_max_position_embeddings": 32,
            },
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
        ),
    ],
)
def test_rope_theta_and_rope_scaling_are_separate_keys(rope: dict[str, Any], scaling: Any) -> None:
    config = saved(CONFIGS["qwen3"](rope_parameters=rope))
    assert config["rope_theta"] == 5e5
    assert config.get("rope_scaling") == scaling
    assert config["rope_parameters"] == rope


def test_gemma_3_has_a_key_for_each_of_its_two_bases() -> None:
    ropes = {
        "sliding_attention": {"rope_type": "default", "rope_theta": 5000.0},
        "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
    }
    config = saved(CONFIGS["gemma3_text"](rope_parameters=ropes))
    assert config["rope_theta"] == 1e6
    assert config["rope_local_base_freq"] == 5000.0
    assert config["rope_scaling"] == {"rope_type": "linear", "factor": 8.0}


def test_phi_3_has_the_three_keys_of_its_rope_scaling() -> None:
    rope = {**LONG, "partial_rotary_factor": 0.5}
    config = saved(Phi3Config(**SIZES, rope_parameters=rope, original_max_position_embeddings=64))
    assert config["rope_scaling"].keys() == {"type", "short_factor", "long_factor"}
    assert config["partial_rotary_factor"] == 0.5
    assert config["original_max_position_embeddings"] == 64


def test_qwen_3_moe_keeps_its_key_for_the_number_of_experts() -> None:
    assert saved(CONFIGS["qwen3_moe"]())["num_experts"] == 6


def test_a_nested_text_configuration_gets_older_names() -> None:
    config = with_older_names({"text_config": {"rope_parameters": {**LONG}}, "dtype": "bfloat16"})
    assert config["text_config"]["rope_theta"] == 50000.0
    assert config["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize("kind", CONFIGS)
def test_transformers_5_reads_the_same_model(tmp_path: Path, kind: str) -> None:
    model = tiny_model(kind)
    Student(model, None).save(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(
        tmp_path, attn_implementation=model.config._attn_implementation
    )
    ids = torch.arange(3, 30)[None]
    assert torch.equal(model(input_ids=ids).logits, again(input_ids=ids).logits)


def test_special_tokens_are_saved_under_the_older_name(tmp_path: Path) -> None:
    """Version 4 expects `extra_special_tokens` to be a mapping, and fails on a list."""
    words = tiny.tokenizer()
    save_tokenizer(words, tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["additional_special_tokens"] == tiny.SPECIAL[1:]
    assert "extra_special_tokens" not in config
    assert set(AutoTokenizer.from_pretrained(tmp_path).all_special_tokens) == set(tiny.SPECIAL)


def test_the_file_says_that_no_bos_or_eos_is_added(tmp_path: Path) -> None:
    """Version 4's LlamaTokenizerFast adds <s> unless the file says otherwise."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, "▁": 3, "a": 4, "▁a": 5}
    words = LlamaTokenizer(vocab=vocabulary, merges=[("▁", "a")])
    save_tokenizer(words, tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "LlamaTokenizer"
    assert (config["add_bos_token"], config["add_eos_token"]) == (False, False)
    assert AutoTokenizer.from_pretrained(tmp_path)("a")["input_ids"] == words("a")["input_ids"]


def _nested(config: Any) -> bool:
    rope = getattr(config, "rope_parameters", None) or {}
    return isinstance(rope, dict) and isinstance(rope.get("full_attention"), dict)


SCALINGS: tuple[dict[str, Any], ...] = (
    {},
    {"rope_type": "linear", "factor": 4.0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024},
)


@pytest.mark.parametrize("scaling", SCALINGS, ids=("default", "linear", "yarn"))
@pytest.mark.parametrize(
    "kind",
    ["gemma3_text", "gemma3n_text", "gemma4_text", "laguna", "lfm3", "mellum", "mimo_v2_flash",
     "modernbert-decoder", "olmo3"],
)  # fmt: skip
def test_rotary_embeddings_of_each_kind_of_layer_are_read_back(
    kind: str, scaling: dict[str, Any], tmp_path: Path
) -> None:
    """transformers 5 also reads the older names, and prefers `rope_scaling`."""
    config = CONFIG_MAPPING[kind]()
    assert _nested(config)
    config.rope_parameters["full_attention"].update(scaling)
    config.save_pretrained(tmp_path)
    expected = load_config(tmp_path).rope_parameters
    write_older_names(tmp_path)
    found = load_config(tmp_path).rope_parameters
    without_type = {
        layer: {key: value for key, value in rope.items() if key != "type"}
        for layer, rope in found.items()
    }
    assert without_type == expected

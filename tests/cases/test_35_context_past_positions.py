"""`check`, and `run` before any stage, reject texts that are longer than a model's positions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BioGptConfig,
    GPT2Config,
    GPTBigCodeConfig,
    GPTJConfig,
    GPTNeoConfig,
    OPTConfig,
)

from stillhouse.check import check_recipe
from stillhouse.commands import run
from stillhouse.errors import RecipeError
from stillhouse.teachers.planned_model import learned_positions, planned_model, trained_positions
from tests import tiny

V = len(tiny.tokenizer())
SIZES: dict[str, Any] = {"vocab_size": V, "eos_token_id": 0, "bos_token_id": 0, "pad_token_id": 0}
LEARNED = {
    "gpt2": GPT2Config(n_positions=64, n_embd=32, n_layer=2, n_head=4, **SIZES),
    "opt": OPTConfig(
        max_position_embeddings=64, hidden_size=32, word_embed_proj_dim=32, ffn_dim=32,
        num_hidden_layers=2, num_attention_heads=4, **SIZES,
    ),
    "gpt_neo": GPTNeoConfig(
        max_position_embeddings=64, hidden_size=32, num_layers=2, num_heads=4,
        attention_types=[[["global", "local"], 1]], **SIZES,
    ),
    "gptj": GPTJConfig(n_positions=64, n_embd=32, n_layer=2, n_head=4, rotary_dim=4, **SIZES),
    "biogpt": BioGptConfig(
        max_position_embeddings=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=32, **SIZES,
    ),
    "gpt_bigcode": GPTBigCodeConfig(n_positions=64, n_embd=32, n_layer=2, n_head=4, **SIZES),
}  # fmt: skip


def recipe(folder: Path, config: Any, context: int, **evaluate: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "teacher")
    tiny.tokenizer().save_pretrained(folder / "teacher")
    (folder / "text.txt").write_text(tiny.text(400))
    student = {"start": "pretrained", "model": str(folder / "teacher")}
    changes = {"data": {"context": context}, "evaluate": {"prompts": [], **evaluate}}
    return {**tiny.recipe(folder, **changes), "student": student}


@pytest.mark.parametrize("kind", LEARNED)
def test_a_context_beyond_learned_positions_is_rejected(tmp_path: Path, kind: str) -> None:
    last = check_recipe(recipe(tmp_path, LEARNED[kind], 65))[-1]
    assert last.level == "error"
    assert "64 positions" in last.text
    assert last.fix == "set data.context to at most 64"


@pytest.mark.parametrize("kind", LEARNED)
def test_the_reported_number_of_positions_is_the_largest_that_fits(kind: str) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LEARNED[kind])
    assert learned_positions(planned_model(LEARNED[kind])) == 64
    assert model(torch.zeros(1, 64, dtype=torch.long)).logits.shape[1] == 64
    with pytest.raises((IndexError, RuntimeError)):
        model(torch.zeros(1, 65, dtype=torch.long))


def test_run_rejects_a_context_beyond_learned_positions_before_any_stage(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="64 positions"):
        run(recipe(tmp_path, LEARNED["gpt2"], 96))
    assert not [*(tmp_path / "run" / "stages").iterdir()]


@pytest.mark.run
def test_a_context_that_fits_is_not_reported(tmp_path: Path) -> None:
    found = check_recipe(recipe(tmp_path, LEARNED["gpt2"], 64))
    assert not [one for one in found if one.level == "error" or one.topic == "context"]


def test_prompts_and_answers_of_the_evaluation_must_fit(tmp_path: Path) -> None:
    raw = recipe(tmp_path, LEARNED["gpt2"], 64, prompts=["x" * 40], max_new_tokens=40)
    last = check_recipe(raw)[-1]
    assert last.level == "error"
    assert "evaluate.max_new_tokens" in last.text + str(last.fix)


def test_a_speed_measurement_beyond_the_context_is_rejected(tmp_path: Path) -> None:
    last = check_recipe(recipe(tmp_path, LEARNED["gpt2"], 64, speed=True))[-1]
    assert last.fix == "set evaluate.speed: false"


@pytest.mark.run
def test_a_context_beyond_rotary_positions_is_only_a_warning(tmp_path: Path) -> None:
    found = {one.topic: one for one in check_recipe(tiny.recipe(tmp_path, data={"context": 300}))}
    assert found["context"].level == "warning"
    assert "256" in found["context"].text


@pytest.mark.parametrize(
    ("scaling", "length"),
    [
        (None, 256),
        ({"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}, 512),
        ({"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}, 1024),
        (
            {
                "rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4,
                "original_max_position_embeddings": 256,
            },
            1024,
        ),
        (
            {
                "rope_type": "llama3", "factor": 8.0, "rope_theta": 1e4, "low_freq_factor": 1.0,
                "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
            },
            256,
        ),
    ],
)  # fmt: skip
def test_trained_positions_include_the_scaling_of_rotary_embeddings(
    scaling: Any, length: int
) -> None:
    changes = {} if scaling is None else {"rope_parameters": scaling}
    assert trained_positions(tiny.llama_config(**changes)) == length

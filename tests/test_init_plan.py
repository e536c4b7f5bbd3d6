"""The sizes and amounts of a recipe that `stillhouse init` writes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from transformers import (
    DeepseekV3Config,
    Gemma3Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    Qwen3MoeConfig,
)

from stillhouse.errors import ModelError
from stillhouse.init_plan import (
    CALIBRATED_STEP,
    CALIBRATION_SECONDS,
    LEAST_TRAINED,
    MOST_TRAINED,
    TRAINING_SECONDS,
    Kept,
    amounts,
    pruned_sizes,
)
from stillhouse.language_model.calibration_check import ROWS_PER_NEURON
from stillhouse.planning.machine import Machine
from stillhouse.planning.model_size import config_size

pytestmark = pytest.mark.run
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 12,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 256,
}
DENSE = LlamaConfig(**SIZES, intermediate_size=768)
"""A layer has 4 · 64² weights of attention and 3 · 64 for each neuron: 10% and 90%."""
MIXTURE = Qwen3MoeConfig(
    **SIZES, head_dim=16, intermediate_size=128, moe_intermediate_size=64, num_experts=8
)
TEACHER = config_size(DENSE)
MACHINE = Machine("cpu", memory=1e9, rate=1e9)


@pytest.mark.parametrize(
    ("share", "layers", "ffn_size"), [(0.75, 12, 544), (0.5, 12, 352), (0.25, 7, 256)]
)
def test_the_ffn_is_cut_first_and_the_depth_when_a_third_is_left(
    share: float, layers: int, ffn_size: int
) -> None:
    found = pruned_sizes(DENSE, share)
    assert found.layers == Kept(layers, 12)
    assert found.ffn_size == Kept(ffn_size, 768)
    cut = LlamaConfig(**{**SIZES, "num_hidden_layers": layers}, intermediate_size=ffn_size)
    assert found.active == pytest.approx(config_size(cut).active, rel=0.001)
    blocks = TEACHER.parameters - TEACHER.ends
    kept = config_size(cut).parameters - TEACHER.ends
    assert kept / blocks == pytest.approx(share, abs=0.03)


@pytest.mark.parametrize(
    "config",
    [
        GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=256),
        GPTNeoXConfig(**{**SIZES, "num_key_value_heads": None}, intermediate_size=128),
        DeepseekV3Config(**SIZES, n_routed_experts=8, moe_intermediate_size=32),
        Gemma3Config(text_config={**SIZES, "intermediate_size": 128}),
    ],
)
def test_a_model_that_cannot_be_pruned_has_no_smaller_sizes(config: Any) -> None:
    with pytest.raises(ModelError, match="cannot be pruned") as found:
        pruned_sizes(config, 0.5)
    assert "pass a model for the student to start from" in str(found.value.fix)


def test_a_mixture_of_experts_loses_layers() -> None:
    found = pruned_sizes(MIXTURE, 0.5)
    assert (found.layers, found.ffn_size) == (Kept(6, 12), None)
    assert 0 < found.active < config_size(MIXTURE).active


def rate_for(tokens: float, student: float) -> float:
    """The FLOP/s at which the allowed time is enough to train on so many tokens."""
    return (6 * student + 2 * TEACHER.active) * tokens / TRAINING_SECONDS


def test_a_long_text_is_limited_to_what_the_machine_can_do() -> None:
    student = TEACHER.active / 2
    found = amounts(5e6, TEACHER, student, replace(MACHINE, rate=rate_for(50_000, student)))
    assert (found.train_tokens, found.epochs, found.batch_size) == (49_152, 1, 2)
    assert found.limited
    two = Machine("cpu", memory=1e9, per_node=2, rate=rate_for(50_000, student))
    assert amounts(5e6, TEACHER, student, two).train_tokens == 98_304
    slow = replace(MACHINE, rate=1.0)
    assert amounts(5e6, TEACHER, student, slow).train_tokens == LEAST_TRAINED


def test_a_short_text_is_repeated_if_there_is_time() -> None:
    student = TEACHER.active / 2
    for passes, epochs in ((5, 3), (2.5, 2), (1.5, 1)):
        machine = replace(MACHINE, rate=rate_for(passes * 10_000, student))
        found = amounts(10_000, TEACHER, student, machine)
        assert (found.train_tokens, found.epochs, found.limited) == (None, epochs, False)


def test_a_fast_machine_is_not_limited() -> None:
    found = amounts(5e6, TEACHER, TEACHER.active, replace(MACHINE, rate=1e15))
    assert (found.train_tokens, found.epochs, found.batch_size) == (MOST_TRAINED, 1, 8)
    assert (found.limited, found.calibration_tokens) == (False, None)


def test_calibration_is_limited_to_what_the_machine_can_do() -> None:
    passed = 3 * 2 * TEACHER.active
    machine = replace(MACHINE, rate=10_000 * passed / CALIBRATION_SECONDS)
    assert amounts(5e6, TEACHER, TEACHER.active, machine).calibration_tokens == 8192


def test_calibration_is_enough_for_the_refit() -> None:
    slow = replace(MACHINE, rate=1.0)
    least = ROWS_PER_NEURON * 2000
    found = amounts(5e6, TEACHER, TEACHER.active, slow, neurons=2000).calibration_tokens
    assert found is not None
    assert least <= found < least + CALIBRATED_STEP

"""Activations traced without allocating them agree with those of a model that runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import GPT2Config, LlamaConfig, Qwen3MoeConfig

from stillhouse.errors import ModelError
from stillhouse.planning.activation_trace import trace_activations
from stillhouse.recomputed import Hooks
from stillhouse.teachers.backbone import hidden_states
from stillhouse.teachers.short_attention import use_short_attention
from tests import tiny

SIZES: dict[str, Any] = {"context": 64, "device": "cpu"}
FLOAT32: dict[str, Any] = {**SIZES, "compute": torch.float32, "weights": torch.float32}
BFLOAT16: dict[str, Any] = {**SIZES, "compute": torch.bfloat16, "weights": torch.float32}


def kept_by(model: Any) -> int:
    """The bytes that an actual forward pass keeps for the backward pass."""
    own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    hooks = Hooks()

    def keep(tensor: torch.Tensor) -> Any:
        found = hooks.pack(tensor)
        if isinstance(found, torch.Tensor):
            storage = found.untyped_storage()
            if storage._cdata not in own:
                kept[storage._cdata] = storage
        return found

    use_short_attention(model, 64, torch.device("cpu"))
    positions_RL = torch.arange(32).repeat(2, 2)  # two documents in each of two windows
    with torch.autograd.graph.saved_tensors_hooks(keep, hooks.unpack):
        hidden_states(model.train(), torch.zeros(2, 64, dtype=torch.long), positions_RL)
    return sum(storage.nbytes() for storage in kept.values())


def test_the_trace_finds_the_bytes_that_a_model_keeps() -> None:
    model = tiny.llama()
    found = trace_activations(model.config, **FLOAT32).times(2)
    assert found.kept == pytest.approx(kept_by(model), rel=0.04)


@pytest.mark.run
def test_checkpointing_keeps_the_inputs_of_the_layers() -> None:
    config = tiny.llama_config(num_hidden_layers=8)
    plain = trace_activations(config, **FLOAT32)
    found = trace_activations(config, **FLOAT32, checkpointing=True)
    layer = 64 * config.hidden_size * 4
    assert 8 * layer <= found.kept < plain.kept / 4
    assert found.kept < found.backward < plain.backward


def test_autocast_copies_the_weights_once_for_any_number_of_windows() -> None:
    config = tiny.llama_config()
    one = trace_activations(config, **BFLOAT16)
    two = one.times(2)
    matrices = 3 * (32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 64)
    assert one.casts == two.casts == 2 * matrices
    assert trace_activations(config, **FLOAT32).casts == 0


@pytest.mark.run
def test_a_pass_without_gradients_uses_less_memory() -> None:
    config = tiny.llama_config(num_hidden_layers=8)
    found = trace_activations(config, **FLOAT32, inference=True)
    assert found.forward < trace_activations(config, **FLOAT32).kept / 3


@pytest.mark.parametrize("settings", [FLOAT32, BFLOAT16])
def test_other_architectures_are_traced(settings: dict[str, Any]) -> None:
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "vocab_size": 300}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    experts = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}
    gpt2 = GPT2Config(n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0)
    for config in (gpt2, Qwen3MoeConfig(**sizes, **heads, head_dim=8, **experts)):
        found = trace_activations(config, **settings)
        assert 0 < found.kept <= found.forward <= found.with_gradients


def test_an_architecture_that_cannot_be_traced_is_an_error() -> None:
    config = LlamaConfig(hidden_size=32, num_attention_heads=4, num_key_value_heads=3)
    with pytest.raises(ModelError, match="a llama model cannot be estimated"):
        trace_activations(config, **FLOAT32)

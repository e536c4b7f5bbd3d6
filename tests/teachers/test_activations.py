"""Activations from one forward pass match those that transformers returns."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM

from stillhouse.errors import ModelError
from stillhouse.teachers.activations import (
    ActivationRequest,
    decoder_layers,
    final_norm,
    run_backbone,
)
from tests import tiny


def gemma2() -> Any:
    """A model with scaled embeddings, and a norm after attention and FFN."""
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
    )
    return Gemma2ForCausalLM(config).eval()


@pytest.mark.parametrize("model", [tiny.llama(), gemma2()], ids=["llama", "gemma2"])
def test_hidden_states_have_the_layer_numbers_of_transformers(model: Any) -> None:
    ids_RL = torch.arange(12).view(2, 6)
    positions_RL = torch.arange(6).expand(2, 6)
    expected = model(input_ids=ids_RL, output_hidden_states=True, use_cache=False).hidden_states
    found = run_backbone(
        model, ids_RL, positions_RL, ActivationRequest(layers=frozenset(range(len(expected))))
    )
    assert sorted(found.layers) == list(range(len(expected)))
    for layer, hidden_RLD in enumerate(expected):
        torch.testing.assert_close(found.layers[layer], hidden_RLD)
    torch.testing.assert_close(found.last_RLD, expected[-1])
    torch.testing.assert_close(found.last_RLD, final_norm(model)(_before_norm(model, ids_RL)))


def _before_norm(model: Any, ids_RL: torch.Tensor) -> torch.Tensor:
    caught = []
    handle = model.base_model.norm.register_forward_pre_hook(
        lambda _, inputs: caught.append(inputs)
    )
    model(input_ids=ids_RL, use_cache=False)
    handle.remove()
    return caught[0][0]


def test_attention_of_a_block_is_its_projections_of_the_normalized_input() -> None:
    model = tiny.llama()
    ids_RL = torch.arange(6)[None]
    found = run_backbone(
        model, ids_RL, None, ActivationRequest(layers=frozenset({1}), attention=frozenset({2}))
    )
    block: Any = decoder_layers(model)[1]
    stream_RLD = block.input_layernorm(found.layers[1])
    assert set(found.attention) == {2}
    for name, projection in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj")):
        expected = getattr(block.self_attn, projection)(stream_RLD)
        torch.testing.assert_close(found.attention[2][name], expected)


def test_no_hooks_are_left_on_the_model() -> None:
    model = tiny.llama()
    request = ActivationRequest(layers=frozenset({0, 1, 3}), attention=frozenset({1}))
    run_backbone(model, torch.arange(6)[None], None, request)
    hooks = [m._forward_hooks or m._forward_pre_hooks for m in model.modules()]
    assert not any(hooks)


def test_a_model_whose_decoder_blocks_are_not_found_is_rejected() -> None:
    model = tiny.llama()
    model.base_model.layers = torch.nn.Sequential(*model.base_model.layers)
    with pytest.raises(ModelError, match="decoder blocks"):
        run_backbone(model, torch.arange(6)[None], None, ActivationRequest(layers=frozenset({1})))

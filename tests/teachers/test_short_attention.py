"""Attention with plain matrix products matches PyTorch's SDPA, forward and backward."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    Gemma3TextConfig,
    LlamaConfig,
    Qwen3Config,
)

from stillhouse.teachers import short_attention as attention
from stillhouse.teachers.backbone import hidden_states
from stillhouse.teachers.short_attention import use_short_attention

SIZES = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.3,
}
CONFIGS = {
    "llama": LlamaConfig(**SIZES),
    "qwen3": Qwen3Config(**SIZES),
    "gemma3, sliding window": Gemma3TextConfig(
        **SIZES,
        sliding_window=5,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
}
LATENT = DeepseekV3Config(
    **{**SIZES, "num_key_value_heads": 4},
    moe_intermediate_size=16,
    n_routed_experts=4,
    num_experts_per_tok=2,
    n_group=1,
    topk_group=1,
    first_k_dense_replace=3,
    kv_lora_rank=16,
    q_lora_rank=16,
    qk_rope_head_dim=8,
    qk_nope_head_dim=8,
    v_head_dim=8,
)
"""Latent attention, whose values have a different width than its keys."""
CPU = torch.device("cpu")
PACKED = torch.tensor([[*range(9), *range(7), *range(4)], [*range(20)]])
PLAIN = torch.arange(20)[None].expand(2, -1)


def made(config: object) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").double()


def run(model: torch.nn.Module, positions_RL: Tensor) -> tuple[Tensor, list[Tensor]]:
    ids_RL = torch.randint(0, 50, (2, 20), generator=torch.Generator().manual_seed(1))
    hidden_RLD = hidden_states(model, ids_RL, positions_RL)
    model.zero_grad()
    hidden_RLD.square().sum().backward()
    return hidden_RLD.detach(), [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("name", [*CONFIGS, "deepseek"])
@pytest.mark.parametrize("positions_RL", [PACKED, PLAIN], ids=["packed", "plain"])
def test_hidden_states_and_gradients_match_sdpa(name: str, positions_RL: Tensor) -> None:
    model = made(CONFIGS.get(name, LATENT))
    expected, expected_grads = run(model, positions_RL)
    assert use_short_attention(model, context=20, device=CPU)
    found, grads = run(model, positions_RL)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert len(grads) == len(expected_grads)
    for grad, wanted in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, wanted, rtol=1e-7, atol=1e-9)


def test_every_layer_uses_short_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    real = attention.short_attention

    def counting(*args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        calls.append(1)
        return real(*args, **kwargs)

    monkeypatch.setattr(attention, "short_attention", counting)
    model = made(CONFIGS["llama"])
    use_short_attention(model, context=20, device=CPU)
    run(model, PACKED)
    assert len(calls) == 3


def test_long_windows_and_other_implementations_are_unchanged() -> None:
    assert not use_short_attention(
        made(CONFIGS["llama"]), context=attention.LONGEST + 1, device=CPU
    )
    torch.manual_seed(0)
    eager = AutoModelForCausalLM.from_config(CONFIGS["llama"], attn_implementation="eager")
    assert not use_short_attention(eager, context=20, device=CPU)


def test_the_saved_config_does_not_name_short_attention(tmp_path: Path) -> None:
    model = made(CONFIGS["llama"])
    use_short_attention(model, context=20, device=CPU)
    model.save_pretrained(tmp_path)
    assert attention.NAME not in (tmp_path / "config.json").read_text()

"""Sizes of attention heads, read from a text model's configuration without importing torch."""

from __future__ import annotations

from typing import Any


def head_size(config: Any) -> int:
    return int(
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )


def key_value_heads(config: Any) -> int:
    return int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)

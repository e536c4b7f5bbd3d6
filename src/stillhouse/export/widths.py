"""Row lengths of a model's matrices, which must be divisible by block and group sizes."""

from __future__ import annotations

from typing import Any

from stillhouse.attention_heads import head_size


def row_widths(config: Any) -> dict[str, int]:
    """Input widths of linear layers, by their configuration keys."""
    text = config.get_text_config()
    ffn = "moe_intermediate_size" if getattr(text, "num_experts", 0) else "intermediate_size"
    widths = {"hidden_size": int(text.hidden_size), ffn: int(getattr(text, ffn))}
    heads = head_size(text) * int(text.num_attention_heads)
    if heads != widths["hidden_size"]:
        widths["num_attention_heads × head_dim"] = heads
    return widths


def nearest(width: int, block: int) -> str:
    """The nearest multiples of `block` below and above, as text."""
    below = width // block * block
    return " or ".join(f"{size:,}" for size in (below, below + block) if size)

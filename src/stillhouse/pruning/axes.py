"""Where each architecture keeps what pruning cuts, as data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from stillhouse.errors import ModelError, RecipeError


@dataclass(frozen=True)
class Axes:
    """Names inside one decoder layer: out = mid + norm?(down(act(gate(x)) · up(x))), x = norm(mid).

    mid is the residual stream after attention. ffn_output_norm: a norm of the FFN's output before
    it is added, where the architecture has one (Gemma 2 and 3).
    """

    ffn: str = "mlp"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    activation: str = "act_fn"
    ffn_input_norm: str = "post_attention_layernorm"
    ffn_output_norm: str | None = None


_PRE_NORM = Axes()
_GEMMA = Axes(
    ffn_input_norm="pre_feedforward_layernorm", ffn_output_norm="post_feedforward_layernorm"
)

ARCHITECTURES: dict[str, Axes] = {
    "gemma": _PRE_NORM,
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
    "llama": _PRE_NORM,
    "mistral": _PRE_NORM,
    "qwen2": _PRE_NORM,
    "qwen3": _PRE_NORM,
    "smollm3": _PRE_NORM,
}
"""By config.model_type: decoder-only models with a gated FFN and attention, one after the other."""

PER_LAYER_LISTS = ("layer_types", "no_rope_layers", "mlp_layer_types", "sliding_window_pattern")
"""Config values that hold one entry a layer. Left as they are, or left out (and so derived anew
from the new layer numbers), they would silently change which layers use RoPE or a window."""


def axes_of(config: Any) -> Axes:
    """The axes of a model's configuration; ModelError names the architectures that have any."""
    axes = ARCHITECTURES.get(config.model_type)
    if axes is None:
        raise ModelError(
            f"models of type {config.model_type!r} cannot be pruned",
            where="student.start",
            fix=f"prunable types: {', '.join(sorted(ARCHITECTURES))}; for others use "
            "start: pretrained or start: random",
        )
    return axes


def part(module: Any, name: str) -> Any:
    """A submodule by its dotted name."""
    for step in name.split("."):
        module = getattr(module, step)
    return module


def check_sizes(config: Any, ffn_size: int | None, layers: int | None) -> None:
    """RecipeError when the pruned sizes are not smaller than, or equal to, the teacher's."""
    axes_of(config)
    if ffn_size is None and layers is None:
        raise RecipeError(
            "a pruned student needs a size to prune to",
            where="student",
            fix=f"set ffn_size (1 to {config.intermediate_size}) or layers "
            f"(1 to {config.num_hidden_layers}), or both",
        )
    limits = (
        ("ffn_size", ffn_size, config.intermediate_size),
        ("layers", layers, config.num_hidden_layers),
    )
    for key, value, largest in limits:
        if value is not None and not 1 <= value <= largest:
            raise RecipeError(
                f"{key}: {value} is not possible: the teacher has {largest}",
                where=f"student.{key}",
                fix=f"choose 1 to {largest}",
            )

"""The modules and configuration keys that pruning cuts, for each architecture."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from stillhouse.errors import ModelError


@dataclass(frozen=True)
class Axes:
    """Names inside a decoder layer, and the architecture's requirements.

        mid = stream + norm?(o_proj(attention(norm(stream))))
        out = mid + norm?(down_proj(act_fn(gate_proj(x)) · up_proj(x))),  x = norm(mid)

    Attention (`self_attn`) reads the stream through q_proj, k_proj, and v_proj, after
    `input_layernorm`; the projections of the FFN are in `mlp`. A mixture of experts has a router
    `mlp.gate`, and stacked weights `mlp.experts.gate_up_proj` [E, 2F, D] and
    `mlp.experts.down_proj` [E, D, F] instead.

    The norms marked `?` are attention_output_norm and ffn_output_norm, which only some
    architectures have (Gemma 2 and 3). If a projection has a bias, it is cut too.

    head_norms: norms with head_dim values, which are never cut.
    ffn_size: the configuration key of the FFN width.
    experts: whether the FFNs are mixtures of experts.
    norm_offset: norms multiply by norm_offset + their weight.
    scaled_embeddings: whether embeddings are multiplied by √hidden_size.
    always_tied: whether llama.cpp supports the architecture only with a tied head.
    hidden_over_heads: whether hidden_size must be a multiple of the number of query heads, whatever
        head_dim is.
    head_dim_key: whether the configuration declares head_dim. If not, it is an extra key, which
        transformers reads as well.
    """

    head_norms: tuple[str, ...] = ()
    attention_output_norm: str | None = None
    ffn_size: str = "intermediate_size"
    experts: bool = False
    ffn_input_norm: str = "post_attention_layernorm"
    ffn_output_norm: str | None = None
    norm_offset: float = 0.0
    scaled_embeddings: bool = False
    always_tied: bool = False
    hidden_over_heads: bool = False
    head_dim_key: bool = True

    def output_norms(self) -> tuple[str, ...]:
        names = (self.attention_output_norm, self.ffn_output_norm)
        return tuple(name for name in names if name is not None)

    def parameters(self) -> set[str]:
        """The dotted names of all parameters that a layer can have, including biases."""
        attention = ("q_proj", "k_proj", "v_proj", "o_proj", *self.head_norms)
        modules = [f"self_attn.{name}" for name in attention]
        modules += ["input_layernorm", self.ffn_input_norm, *self.output_norms()]
        if not self.experts:
            modules += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
        found = {f"{name}.{kind}" for name in modules for kind in ("weight", "bias")}
        if self.experts:
            found |= {"mlp.gate.weight", "mlp.experts.gate_up_proj", "mlp.experts.down_proj"}
        return found


_HEAD_NORMS = ("q_norm", "k_norm")
_GEMMA = Axes(norm_offset=1.0, scaled_embeddings=True, always_tied=True)
_GEMMA_2 = replace(
    _GEMMA,
    attention_output_norm="post_attention_layernorm",
    ffn_input_norm="pre_feedforward_layernorm",
    ffn_output_norm="post_feedforward_layernorm",
    hidden_over_heads=True,
)

ARCHITECTURES: dict[str, Axes] = {
    "gemma": _GEMMA,
    "gemma2": _GEMMA_2,
    "gemma3_text": replace(_GEMMA_2, head_norms=_HEAD_NORMS),
    "llama": Axes(hidden_over_heads=True),
    "ministral": Axes(),
    "ministral3": Axes(),
    "mistral": Axes(),
    "qwen2": Axes(head_dim_key=False),
    "qwen3": Axes(head_norms=_HEAD_NORMS),
    "qwen3_moe": Axes(
        head_norms=_HEAD_NORMS,
        head_dim_key=False,
        ffn_size="moe_intermediate_size",
        experts=True,
    ),
    "smollm3": Axes(head_dim_key=False),
}
"""By config.model_type: decoder-only models with attention followed by a gated FFN."""

ALL_LAYERS_HAVE_EXPERTS: dict[str, Any] = {"mlp_only_layers": [], "decoder_sparse_step": 1}
"""Configuration keys, each with the value for which no layer has a plain FFN instead."""

PER_LAYER_LISTS = ("layer_types", "no_rope_layers", "mlp_layer_types", "sliding_window_pattern")
"""Configuration keys with one entry per layer. If they stayed unchanged, or were removed (and so
derived from the new layer numbers), the remaining layers' use of RoPE or a sliding window would
silently change."""


def axes_of(config: Any) -> Axes:
    """The axes for a model's configuration.

    Raises ModelError, naming the supported architectures, if the model cannot be pruned.
    """
    axes = ARCHITECTURES.get(config.model_type)
    if axes is None and getattr(config, "text_config", None) is not None:
        raise ModelError(
            f"models of type {config.model_type!r} have inputs other than text, and cannot be "
            "pruned as a whole",
            where="student.start",
            fix=f"save its text model ({config.text_config.model_type}) as a separate checkpoint, "
            "and use that: load this model with transformers, and copy the weights of its language "
            "model into AutoModelForCausalLM.from_config(config.text_config)",
        )
    if axes is None:
        raise ModelError(
            f"models of type {config.model_type!r} cannot be pruned",
            where="student.start",
            fix="use start: pretrained or start: random, or a model of a supported type: "
            f"{', '.join(sorted(ARCHITECTURES))}",
        )
    if axes.experts:
        for key, needed in ALL_LAYERS_HAVE_EXPERTS.items():
            value = getattr(config, key, needed)
            if value != needed:
                raise ModelError(
                    f"{config.model_type} models that have plain FFNs in some layers "
                    f"({key}: {value}) cannot be pruned: which layers have experts depends on the "
                    "layers' numbers",
                    where="student.start",
                    fix="use start: pretrained or start: random",
                )
    return axes

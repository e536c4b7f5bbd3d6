"""Tables of the modules and configuration keys that pruning cuts, by architecture."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from stillhouse.errors import ModelError


@dataclass(frozen=True)
class Experts:
    """A mixture of experts instead of an FFN, its weights stacked over the experts.

    router, experts: submodules of the FFN. gate_up [E, 2F, D] and down [E, D, F]: parameters of
    `experts`. count, chosen: configuration keys (all experts; experts per token). exceptions:
    configuration values under which some layers have a plain FFN instead.
    """

    router: str = "gate"
    experts: str = "experts"
    gate_up: str = "gate_up_proj"
    down: str = "down_proj"
    count: str = "num_experts"
    chosen: str = "num_experts_per_tok"
    exceptions: tuple[tuple[str, Any], ...] = (("mlp_only_layers", []), ("decoder_sparse_step", 1))


@dataclass(frozen=True)
class Axes:
    """Names inside one decoder layer, and what its architecture requires.

        mid = stream + norm?(output(attention(norm(stream))))
        out = mid + norm?(down(act(gate(x)) · up(x))),  x = norm(mid)

    The norms marked `?` are attention_output_norm and ffn_output_norm, if the architecture has
    them (Gemma 2 and 3). A norm multiplies by norm_offset + its weight. head_norms have head_dim
    values and are never cut. ffn_size: the configuration key of the FFN width. scaled_embeddings:
    embeddings are multiplied by √hidden_size. always_tied: llama.cpp supports the architecture with
    a tied head only. hidden_over_heads: the configuration requires that
    hidden_size is a multiple of the number of query heads, whatever head_dim is. head_dim_key:
    the configuration declares a head_dim; otherwise it is an extra key, which transformers
    also reads. Biases are cut if a projection has one.
    """

    attention: str = "self_attn"
    query: str = "q_proj"
    key: str = "k_proj"
    value: str = "v_proj"
    output: str = "o_proj"
    head_norms: tuple[str, ...] = ()
    attention_input_norm: str = "input_layernorm"
    attention_output_norm: str | None = None
    ffn: str = "mlp"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    activation: str = "act_fn"
    ffn_size: str = "intermediate_size"
    experts: Experts | None = None
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
        """Every parameter that a layer may have, biases included, by its dotted name."""
        attention = [self.query, self.key, self.value, self.output, *self.head_norms]
        names = [f"{self.attention}.{name}" for name in attention]
        names += [self.attention_input_norm, self.ffn_input_norm, *self.output_norms()]
        found = {f"{name}.{kind}" for name in names for kind in ("weight", "bias")}
        if self.experts is None:
            linears = (self.gate, self.up, self.down)
            return found | {f"{self.ffn}.{n}.{k}" for n in linears for k in ("weight", "bias")}
        experts = f"{self.ffn}.{self.experts.experts}"
        stacked = {f"{experts}.{self.experts.gate_up}", f"{experts}.{self.experts.down}"}
        return found | stacked | {f"{self.ffn}.{self.experts.router}.weight"}


_PLAIN = Axes()
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
    "llama": replace(_PLAIN, hidden_over_heads=True),
    "ministral": _PLAIN,
    "ministral3": _PLAIN,
    "mistral": _PLAIN,
    "qwen2": replace(_PLAIN, head_dim_key=False),
    "qwen3": replace(_PLAIN, head_norms=_HEAD_NORMS),
    "qwen3_moe": replace(
        _PLAIN,
        head_norms=_HEAD_NORMS,
        head_dim_key=False,
        ffn_size="moe_intermediate_size",
        experts=Experts(),
    ),
    "smollm3": replace(_PLAIN, head_dim_key=False),
}
"""By config.model_type: decoder-only models with attention and a gated FFN in sequence."""

PER_LAYER_LISTS = ("layer_types", "no_rope_layers", "mlp_layer_types", "sliding_window_pattern")
"""Config values with one entry per layer. If unchanged, or left out (and so derived from the
new layer numbers), they would silently change which layers use RoPE or a window."""


def axes_of(config: Any) -> Axes:
    """The axes of a model's configuration. Raises ModelError, with the prunable architectures."""
    axes = ARCHITECTURES.get(config.model_type)
    if axes is None and getattr(config, "text_config", None) is not None:
        raise ModelError(
            f"models of type {config.model_type!r} have inputs other than text, and cannot be "
            "pruned as one model",
            where="student.start",
            fix=f"save the text model inside ({config.text_config.model_type}) as a checkpoint of "
            "its own and name that one: load this one with transformers and copy the weights of "
            "its language model into AutoModelForCausalLM.from_config(config.text_config)",
        )
    if axes is None:
        raise ModelError(
            f"models of type {config.model_type!r} cannot be pruned",
            where="student.start",
            fix=f"prunable types: {', '.join(sorted(ARCHITECTURES))}; for others use "
            "start: pretrained or start: random",
        )
    if axes.experts is not None:
        for key, plain in axes.experts.exceptions:
            value = getattr(config, key, plain)
            if value != plain:
                raise ModelError(
                    f"{config.model_type} models with plain FFNs between those with experts "
                    f"({key}: {value}) cannot be pruned: which layers have which depends on "
                    "their numbers",
                    where="student.start",
                    fix="use start: pretrained or start: random",
                )
    return axes


def part(module: Any, name: str) -> Any:
    """A submodule by its dotted name."""
    for step in name.split("."):
        module = getattr(module, step)
    return module

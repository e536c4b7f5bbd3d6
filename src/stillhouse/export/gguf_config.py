"""A model's shapes and constants as GGUF metadata, and how transformers reads them back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from stillhouse.attention_heads import head_size
from stillhouse.export.gguf_model import (
    biased_parts,
    family,
    long_factors,
    ropes,
    rotated_size,
    window_pattern,
    windows,
)
from stillhouse.scratch import temporary_folder
from stillhouse.teachers.gguf_families import all_but_last
from stillhouse.teachers.quiet import quiet

PLAIN_KEYS = (
    "num_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "norm_topk_prob",
    "query_pre_attn_scalar",
    "attn_logit_softcapping",
    "final_logit_softcapping",
)
"""Configuration values that affect a forward pass, in addition to the shapes in every file."""


def add_configuration(writer: gguf.GGUFWriter, config: Any) -> None:
    """Write the shapes and constants that a runtime needs to build the model."""
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(rotated_size(config))
    writer.add_key_length(head_size(config))
    writer.add_value_length(head_size(config))
    writer.add_vocab_size(config.vocab_size)
    _add_ropes(writer, config)
    if config.model_type == "granite":
        writer.add_attention_scale(float(config.attention_multiplier))
        writer.add_embedding_scale(float(config.embedding_multiplier))
        writer.add_residual_scale(float(config.residual_multiplier))
        writer.add_logit_scale(float(config.logits_scaling))
    if family(config).window_period:
        _add_windows(writer, config)
    if getattr(config, "num_experts", 0):
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)


def _add_ropes(writer: gguf.GGUFWriter, config: Any) -> None:
    found = ropes(config)
    rope = found["full_attention"]
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    if "sliding_attention" in found:
        writer.add_rope_freq_base_swa(float(found["sliding_attention"]["rope_theta"]))
    if rope["rope_type"] == "longrope" and long_factors(config):
        _, attention_factor = ROPE_INIT_FUNCTIONS["longrope"](config, "cpu")
        writer.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE)
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        writer.add_rope_scaling_attn_factors(float(attention_factor))
    if rope["rope_type"] not in ("linear", "yarn"):
        return
    writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
    writer.add_rope_scaling_factor(float(rope["factor"]))
    if rope["rope_type"] == "yarn":
        original = rope.get("original_max_position_embeddings") or config.max_position_embeddings
        writer.add_rope_scaling_orig_ctx_len(original)
        writer.add_rope_scaling_yarn_beta_fast(float(rope.get("beta_fast") or 32.0))
        writer.add_rope_scaling_yarn_beta_slow(float(rope.get("beta_slow") or 1.0))
        if rope.get("mscale_all_dim"):
            writer.add_rope_scaling_yarn_log_mul(float(rope["mscale_all_dim"]))
        if rope.get("llama_4_scaling_beta"):
            writer.add_attn_temperature_scale(float(rope["llama_4_scaling_beta"]))


def _add_windows(writer: gguf.GGUFWriter, config: Any) -> None:
    writer.add_sliding_window(config.sliding_window)
    pattern = window_pattern(config)
    if pattern != all_but_last(family(config).window_period, config.num_hidden_layers):
        writer.add_sliding_window_pattern(pattern)
    if config.attn_logit_softcapping is not None:
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
    if config.final_logit_softcapping is not None:
        writer.add_final_logit_softcapping(config.final_logit_softcapping)


def misread_by_transformers(config: Any) -> str | None:
    """What transformers' GGUF loader would misread in this model's file; None: nothing.

    The configuration is written, read back by the installed version of transformers, and compared.
    Raises ModelError like `family`.
    """
    with temporary_folder("stillhouse-gguf-") as folder:
        file = Path(folder) / "header.gguf"
        writer = gguf.GGUFWriter(file, family(config).name)
        add_configuration(writer, config)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        try:
            with quiet():
                read = AutoConfig.from_pretrained(folder, gguf_file=file.name)
        except StrictDataclassError:
            return "sizes that it does not allow"
        except (KeyError, ValueError):
            return f"the architecture {family(config).name}"
    mine, theirs = _meaning(config), _meaning(read)
    return next((key for key, value in mine.items() if value != theirs[key]), None)


def _meaning(config: Any) -> dict[str, Any]:
    """The values that affect a forward pass, under readable names."""
    bases = {kind: np.float32(rope["rope_theta"]) for kind, rope in ropes(config).items()}
    scalings = {kind: rope["rope_type"] for kind, rope in ropes(config).items()}
    seen = window_pattern(config) if len(bases) > 1 else windows(config)
    return {
        "the head size": head_size(config),
        "biases": biased_parts(config),
        "the base of rotary embeddings": bases,
        "the scaling of rotary embeddings": scalings,
        "the rotated part of each head": rotated_size(config),
        "which layers have a window": seen,
        **{key: getattr(config, key, None) for key in PLAIN_KEYS},
    }

"""Tiny models of every architecture that GGUF supports, with options that change their outputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, Olmo2Config, Phi3Config

from tests import tiny
from tests.teachers.toys import CONFIGS

LLAMA_3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
}
LINEAR = {"rope_type": "linear", "rope_theta": 100000.0, "factor": 4.0}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.3, 1.7],
    "long_factor": [1.0, 1.5, 3.0, 6.0],
    "original_max_position_embeddings": 256,
}
LONG_SIZES = {"max_position_embeddings": 512, "original_max_position_embeddings": 256}
GEMMA_3 = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 5000.0},
    "full_attention": {"rope_type": "linear", "rope_theta": 1000000.0, "factor": 8.0},
}
MINISTRAL_3 = {**YARN, "mscale_all_dim": 1.0, "mscale": 1.0, "llama_4_scaling_beta": 0.5}
SCALES = {
    "attention_multiplier": 0.2,
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.5,
    "logits_scaling": 4.0,
}

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama, untied": ("llama", {"tie_word_embeddings": False}),
    "llama, linear": ("llama", {"rope_parameters": LINEAR}),
    "llama, llama3": ("llama", {"rope_parameters": LLAMA_3}),
    "llama, yarn": ("llama", {"rope_parameters": YARN}),
    "llama, biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama, wide heads": ("llama", {"head_dim": 16}),
    "mistral": ("mistral", {"sliding_window": None}),
    "ministral3": ("ministral3", {"rope_parameters": MINISTRAL_3}),
    "qwen2": ("qwen2", {}),
    "qwen2, yarn": ("qwen2", {"rope_parameters": YARN}),
    "qwen2, wide heads": ("qwen2", {"head_dim": 16}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "qwen3_moe": ("qwen3_moe", {}),
    "gemma": ("gemma", {}),
    "gemma2": ("gemma2", {}),
    "gemma2, a pattern": (
        "gemma2",
        {"layer_types": ["full_attention"] + ["sliding_attention"] * 2},
    ),
    "gemma3": ("gemma3_text", {"layer_types": ["sliding_attention"] * 3}),
    "gemma3, two bases": ("gemma3_text", {"rope_parameters": GEMMA_3}),
    "gemma3, soft cap": ("gemma3_text", {"final_logit_softcapping": 3.0}),
    "phi3": ("phi3", {}),
    "phi3, longrope": (
        "phi3",
        {"rope_parameters": LONG, **LONG_SIZES},
    ),
    "phi3, partial rotary": (
        "phi3",
        {
            "rope_parameters": {
                **LONG,
                "partial_rotary_factor": 0.5,
                "short_factor": [1.0, 1.3],
                "long_factor": [1.0, 3.0],
            },
            **LONG_SIZES,
        },
    ),
    "granite": ("granite", SCALES),
    "olmo2": ("olmo2", {}),
    "smollm3": ("smollm3", {"num_hidden_layers": 4, "no_rope_layers": [1, 1, 1, 0]}),
}
"""name: (transformers' model type, changes to the configuration in `tests.teachers.toys`)"""


def config(kind: str, **changes: Any) -> Any:
    sizes = {**CONFIGS["llama"]().to_dict(), "rope_parameters": None}
    sizes = {key: sizes[key] for key in SIZES} | changes
    if kind == "phi3":
        return Phi3Config(**sizes)
    if kind == "olmo2":
        return Olmo2Config(**sizes)
    return CONFIGS[kind](**changes)


SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "initializer_range",
)


def save(folder: Path, name: str, **more: Any) -> Any:
    """Save the model with a tokenizer and return it. Its norms and biases are random, unlike those
    of initialization."""
    kind, changes = MODELS[name]
    words = tiny.merging_tokenizer()
    tokens = {
        "vocab_size": len(words),
        "bos_token_id": None,
        "eos_token_id": words.eos_token_id,
        "pad_token_id": words.pad_token_id,
    }
    made = config(kind, **{**tokens, **changes, **more})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        made, attn_implementation="eager" if kind == "gemma2" else "sdpa"
    )
    for key, parameter in model.named_parameters():
        if "norm" in key or key.endswith("bias"):
            parameter.data.add_(torch.randn(parameter.shape) * 0.2)
    model.eval().requires_grad_(False).save_pretrained(folder)
    words.save_pretrained(folder)
    return model

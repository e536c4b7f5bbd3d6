"""A Hugging Face model's architecture and tensors under their GGUF names."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import gguf
import numpy as np

from stillhouse.attention_heads import head_size
from stillhouse.errors import ModelError
from stillhouse.teachers.gguf_families import (
    ARCHITECTURES,
    ATTENTION,
    FFN,
    LLAMA,
    LONG_FACTORS,
    QKV,
    SHORT_FACTORS,
    Array,
    Family,
    all_but_last,
    llama3_divisors,
)


def family(config: Any) -> Family:
    """The file's architecture. A Qwen 2 model whose heads do not add up to its hidden size is
    written as a Llama model with biases, which is equivalent, since llama.cpp's Qwen 2 does not
    support other head sizes.

    Raises ModelError if llama.cpp or the writer does not support the architecture or a feature.
    """
    found = ARCHITECTURES.get(config.model_type)
    if found is None:
        raise unsupported(f"the architecture {config.model_type}")
    full = head_size(config) * config.num_attention_heads == config.hidden_size
    if config.model_type == "qwen2" and not full:
        found = LLAMA
    for lacking in _lacks(config, found):
        raise unsupported(lacking)
    return found


def _lacks(config: Any, found: Family) -> Iterator[str]:
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    if activation != found.activation:
        yield f"the activation {activation} in a {config.model_type}"
    for layers, rope in ropes(config).items():
        allowed = ("default",) if layers == "sliding_attention" else found.ropes
        if rope["rope_type"] not in allowed:
            yield f"rotary embeddings of a {config.model_type} scaled by {rope['rope_type']}"
        yield from _lacks_of_rope(rope, config, found)
    if not found.window_period and any(windows(config)):
        yield f"sliding-window attention in a {config.model_type}"
    extra = sorted(biased_parts(config) - found.biases)
    if extra:
        yield f"a bias of {extra[0]} in a {config.model_type}"
    yield from _lacks_of_layers(config, found)
    if config.model_type == "olmo2" and config.tie_word_embeddings:
        yield "an olmo2 whose head is tied to its embeddings"
    if getattr(config, "num_experts", 0):
        if not config.norm_topk_prob:
            yield "experts whose weights do not add up to 1 (norm_topk_prob: false)"
        if config.mlp_only_layers or config.decoder_sparse_step != 1:
            yield "layers without experts among layers with experts"


def _lacks_of_rope(rope: dict[str, Any], config: Any, found: Family) -> Iterator[str]:
    kind, tuned = rope["rope_type"], found.arch is gguf.MODEL_ARCH.MISTRAL3
    if rope.get("partial_rotary_factor", 1.0) != 1.0 and not found.partly_rotated:
        yield f"a {config.model_type} that rotates only part of each head"
    varies = rope.get("short_factor") != rope.get("long_factor") or not rope.get("long_factor")
    if kind == "longrope":
        if not found.partly_rotated and (varies or rope.get("attention_factor") != 1):
            yield f"rotary embeddings of a {config.model_type} scaled by longrope"
    elif not rope.get("truncate", True) or rope.get("attention_factor") is not None:
        yield "rotary embeddings with a custom attention_factor"
    if rope.get("mscale", 1) not in (0, 1):
        yield f"rotary embeddings with mscale {rope['mscale']}"
    if kind != "yarn" or tuned:
        return
    if (rope.get("beta_fast") or 32, rope.get("beta_slow") or 1) != (32, 1):
        yield f"a {config.model_type} with a custom beta_fast or beta_slow"
    if rope.get("mscale_all_dim") and rope.get("mscale"):
        yield f"a {config.model_type} with mscale_all_dim"


def _lacks_of_layers(config: Any, found: Family) -> Iterator[str]:
    """Check features that llama.cpp derives from the number of layers or a layer's position."""
    if found.rope_period and list(config.no_rope_layers) != all_but_last(
        found.rope_period, config.num_hidden_layers
    ):
        yield (
            f"a {config.model_type} in which other layers than every {found.rope_period}th have no "
            "rotary embedding (as after a cut in depth): llama.cpp hard-codes that pattern"
        )
    if not found.window_period:
        return
    width_scaled = config.num_hidden_layers == found.width_scaled_layers
    width = config.hidden_size // config.num_attention_heads
    scaled_by = width if width_scaled else head_size(config)
    if config.query_pre_attn_scalar != scaled_by:
        yield (
            f"a {config.model_type} of {config.num_hidden_layers} layers whose attention is scaled "
            f"by {config.query_pre_attn_scalar}: llama.cpp scales it by {scaled_by}"
        )
    if getattr(config, "use_bidirectional_attention", None):
        yield "attention to later tokens"
    capped = config.attn_logit_softcapping is not None, config.final_logit_softcapping is not None
    if config.model_type == "gemma2" and not all(capped):
        yield "a gemma2 without soft caps"
    if config.model_type == "gemma3_text" and capped[0]:
        yield "a gemma3_text with attn_logit_softcapping"


def unsupported(what: str) -> ModelError:
    return ModelError(
        f"the GGUF writer does not support {what}",
        where="export.formats",
        fix="export safetensors, and try llama.cpp's convert_hf_to_gguf.py; the writer supports "
        f"{', '.join(ARCHITECTURES)} (see docs/quantize.md for their features)",
    )


def unknown_tokenizer(kind: str) -> ModelError:
    return ModelError(
        f"the GGUF writer does not support tokenizers {kind}",
        where="export.formats",
        fix="export safetensors, and convert that folder with llama.cpp's convert_hf_to_gguf.py; "
        "the writer supports byte-level BPE as in GPT-2, SmolLM, Llama 3, and Qwen, and BPE with "
        "byte fallback as in Llama 2, Mistral, and Gemma",
    )


def ropes(config: Any) -> dict[str, dict[str, Any]]:
    """Rotary embeddings by layer type; most architectures have only one type, full_attention."""
    found = config.rope_parameters or {}
    by_layers = {kind: rope for kind, rope in found.items() if isinstance(rope, dict)}
    default = {"rope_type": "default", "rope_theta": 10000.0}
    return {kind: default | rope for kind, rope in (by_layers or {"full_attention": found}).items()}


def windows(config: Any) -> list[int]:
    """Each layer's sliding-window size; 0: the layer attends to the full context."""
    size = getattr(config, "sliding_window", None) or 0
    if size >= config.max_position_embeddings or not getattr(config, "use_sliding_window", True):
        size = 0
    # Mistral has a window in every layer, and no list.
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    return [size if kind == "sliding_attention" else 0 for kind in kinds]


def window_pattern(config: Any) -> list[bool]:
    """Which layers have a sliding window, whether or not the context is longer."""
    return [kind == "sliding_attention" for kind in config.layer_types]


def biased_parts(config: Any) -> frozenset[str]:
    found = QKV if config.model_type == "qwen2" else frozenset()
    if getattr(config, "attention_bias", False):
        found |= ATTENTION
    return found | FFN if getattr(config, "mlp_bias", False) else found


def rope_factors(config: Any) -> Array | None:
    """The divisor of each rotary frequency, [head size / 2]; None if all are 1, or if they depend
    on the text's length (see `long_factors`)."""
    rope = ropes(config)["full_attention"]
    if rope["rope_type"] == "longrope" and rope["short_factor"] == rope["long_factor"]:
        return np.asarray(rope["long_factor"], dtype=np.float32)
    if rope["rope_type"] != "llama3":
        return None
    return llama3_divisors(rope, head_size(config)).astype(np.float32)


def long_factors(config: Any) -> dict[str, Array]:
    """The divisors of rotary frequencies for texts longer than the original context, and for other
    texts, by tensor name."""
    rope = ropes(config)["full_attention"]
    if rope["rope_type"] != "longrope" or rope_factors(config) is not None:
        return {}
    return {
        LONG_FACTORS: np.asarray(rope["long_factor"], dtype=np.float32),
        SHORT_FACTORS: np.asarray(rope["short_factor"], dtype=np.float32),
    }


def rotated_size(config: Any) -> int:
    """How many dimensions of each head are rotated."""
    return int(head_size(config) * ropes(config)["full_attention"].get("partial_rotary_factor", 1))


def gguf_names(names: Iterable[str], config: Any) -> dict[str, str]:
    """Each tensor's name in GGUF. Raises ModelError if the architecture has no such tensor."""
    known = gguf.get_tensor_name_map(family(config).arch, config.num_hidden_layers)
    found = {name: known.get_name(name, try_suffixes=(".weight", ".bias")) for name in names}
    unknown = sorted(name for name, there in found.items() if there is None)
    if unknown:
        raise unsupported(f"the tensor {unknown[0]} in a model of type {config.model_type}")
    return found

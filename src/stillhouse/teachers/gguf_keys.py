"""A GGUF file's metadata as a transformers configuration.

Every key of the file's architecture must be read here or known to have no effect. Otherwise the
file is rejected with the key in the message, since ignoring it could silently change the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import gguf
import numpy as np
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig

from stillhouse.teachers.gguf_families import (
    ARCHITECTURES,
    DIVISORS,
    LONG_FACTORS,
    NAMES,
    ROPE_FACTORS,
    SHORT_FACTORS,
    Family,
    all_but_last,
    llama3_divisors,
    model_type,
)

Keys = dict[str, Any]

NO_EFFECT = frozenset(
    {
        "vocab_size",  # known from the embedding's rows
        "rope.scaling.finetuned",
        "tensor_data_layout",
        "mm.tokens_per_image",
    }
)
NEUTRAL: dict[str, Any] = {
    "attention.causal": True,
    "attention.clamp_kqv": 0.0,
    "attention.max_alibi_bias": 0.0,
    "attention.sliding_window": 0,
    "use_parallel_residual": False,
    "pooling_type": 0,
    "expert_count": 0,
    "expert_used_count": 0,
    "expert_shared_count": 0,
    "leading_dense_block_count": 0,
    "nextn_predict_layers": 0,
    "expert_gating_func": 1,  # softmax
    "rope.scaling.attn_factor": 1.0,
    "rope.scaling.yarn_attn_factor": 1.0,
    "rope.scaling.yarn_ext_factor": 1.0,
}
"""Keys that have no effect with this value and change the model with any other."""

LLAMA_3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
"""The scaling of every Llama 3. A file stores only the frequency divisors computed from it."""


class UnreadableGGUFError(Exception):
    """Part of the file has no equivalent in transformers."""


def read_config(reader: gguf.GGUFReader) -> Any:
    """Read the configuration of the file's model.

    Raises UnreadableGGUFError: an unknown architecture, key, or value, or a missing key.
    """
    fields = reader.fields
    _check_kind(fields)
    architecture = _text(fields, "general.architecture")
    kind = model_type(architecture)
    if kind is None:
        raise UnreadableGGUFError(
            f"the architecture {architecture} is not supported (supported: "
            f"{', '.join(sorted(NAMES))})"
        )
    prefix = f"{architecture}."
    keys = {
        key.removeprefix(prefix): field.contents()
        for key, field in fields.items()
        if key.startswith(prefix)
    }
    shapes = {tensor.name: [int(n) for n in tensor.shape[::-1]] for tensor in reader.tensors}
    try:
        values = _values(keys, shapes, reader, kind)
    except KeyError as missing:
        raise UnreadableGGUFError(f"the key {prefix}{missing.args[0]} is missing") from missing
    if values["num_hidden_layers"] > len(shapes):
        raise UnreadableGGUFError(f"{prefix}block_count = {values['num_hidden_layers']}")
    unknown = {k: v for k, v in keys.items() if k not in NO_EFFECT and NEUTRAL.get(k) != v}
    if unknown:
        listed = ", ".join(f"{prefix}{key} = {value}" for key, value in list(unknown.items())[:3])
        raise UnreadableGGUFError(f"{listed} is not supported for this architecture")
    try:
        return AutoConfig.for_model(**values)
    except (StrictDataclassError, ValueError, TypeError, KeyError) as error:
        raise UnreadableGGUFError(f"its configuration is invalid ({error})") from error


def _check_kind(fields: Mapping[str, Any]) -> None:
    kind = _text(fields, "general.type") or "model"
    if kind != "model":
        raise UnreadableGGUFError(f"it does not contain a model: general.type = {kind}")
    if "split.count" in fields and fields["split.count"].contents() > 1:
        raise UnreadableGGUFError(
            "it is one of several parts: join them with llama-gguf-split --merge"
        )


def _text(fields: Mapping[str, Any], key: str) -> str:
    return str(fields[key].contents()) if key in fields else ""


def _values(
    keys: Keys, shapes: Mapping[str, list[int]], reader: gguf.GGUFReader, kind: str
) -> dict[str, Any]:
    heads = _one(keys, "attention.head_count")
    hidden = _one(keys, "embedding_length")
    size = keys.pop("attention.key_length", hidden // heads)
    if keys.pop("attention.value_length", size) != size:
        raise UnreadableGGUFError(f"attention.value_length differs from the key heads' size {size}")
    values: dict[str, Any] = {
        "model_type": kind,
        "vocab_size": shapes.get("token_embd.weight", [0])[0],
        "hidden_size": hidden,
        "num_hidden_layers": _one(keys, "block_count"),
        "intermediate_size": _one(keys, "feed_forward_length"),
        "num_attention_heads": heads,
        "num_key_value_heads": _one(keys, "attention.head_count_kv", heads),
        "max_position_embeddings": _one(keys, "context_length"),
        "rms_norm_eps": _positive(keys, "attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": "output.weight" not in shapes,
        # The tokenizer defines these; the architecture's defaults can be beyond the file's rows.
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),
    }
    known = AutoConfig.for_model(kind)
    if hasattr(known, "head_dim") or size * heads != hidden:
        values["head_dim"] = size
    values["rope_parameters"] = _rope(keys, reader, values, size)
    rope = values["rope_parameters"]
    if rope.get("partial_rotary_factor", 1) != 1 and not ARCHITECTURES[kind].partly_rotated:
        raise UnreadableGGUFError(
            f"heads of size {size} with partial rotary embeddings (rope.dimension_count) are not "
            "supported"
        )
    values |= _biases(shapes, kind)
    return values | MORE[kind](keys, values, ARCHITECTURES[kind]) if kind in MORE else values


def _one(keys: Keys, key: str, default: Any = None) -> int:
    """A number that can be given once per layer, and must then be the same for all layers."""
    found = keys.pop(key) if default is None else keys.pop(key, default)
    each = set(found) if isinstance(found, list) else {found}
    if len(each) != 1:
        raise UnreadableGGUFError(f"its layers have different sizes ({key} = {found})")
    return int(each.pop())


def _float(value: float) -> float:
    """The shortest decimal number that rounds to the file's 32-bit float, such as 1e-05."""
    return float(str(np.float32(value)))


def _positive(keys: Keys, key: str, default: float | None = None) -> float:
    found = _float(keys.pop(key) if default is None else keys.pop(key, default))
    if not 0 < found < math.inf:
        raise UnreadableGGUFError(f"{key} = {found}")
    return found


def _biases(shapes: Mapping[str, list[int]], kind: str) -> dict[str, Any]:
    """The configuration's keys for biases, which a file shows only by its tensors."""
    found = {
        part
        for part in ("attn_q", "attn_output", "ffn_up")
        if kind != "qwen2" and f"blk.0.{part}.bias" in shapes
    }
    if found == {"attn_q"} and kind == "llama":
        return {"model_type": "qwen2"}  # a llama with biases only for queries, keys, and values
    parts = {"attention_bias": "attn_q", "mlp_bias": "ffn_up"}
    return {key: True for key, part in parts.items() if part in found}


# --- rotary embeddings ----------------------------------------------------------------------------


def _rope(
    keys: Keys, reader: gguf.GGUFReader, values: Mapping[str, Any], size: int
) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_theta": _positive(keys, "rope.freq_base", 10000.0)}
    rotated = keys.pop("rope.dimension_count", size)
    if rotated != size:
        rope["partial_rotary_factor"] = rotated / size
    # llama.cpp scales linearly if the file does not specify a type; a factor of 0 means 1.
    kind = keys.pop("rope.scaling.type", "linear")
    older = keys.pop("rope.scale_linear", 1.0)
    keys["rope.scaling.factor"] = keys.get("rope.scaling.factor", older) or 1.0
    factor = _positive(keys, "rope.scaling.factor")
    original = keys.pop("rope.scaling.original_context_length", None)
    divisors = _divisors(reader)
    if LONG_FACTORS in divisors or kind == "longrope":
        return rope | _long(keys, divisors, original, values)
    if kind == "yarn":
        if divisors:
            raise UnreadableGGUFError(
                f"{', '.join(divisors)} together with rope.scaling.type = yarn"
            )
        return rope | _yarn(keys, factor, original or values["max_position_embeddings"])
    if kind not in ("linear", "none"):
        raise UnreadableGGUFError(f"rope.scaling.type = {kind}")
    scaled = kind == "linear" and factor != 1.0
    if ROPE_FACTORS in divisors:
        if scaled:
            raise UnreadableGGUFError(
                f"{ROPE_FACTORS} together with rope.scaling.factor = {factor}"
            )
        return rope | _divided(divisors[ROPE_FACTORS], rope["rope_theta"], values)
    return rope | (
        {"rope_type": "linear", "factor": factor} if scaled else {"rope_type": "default"}
    )


def _divisors(reader: gguf.GGUFReader) -> dict[str, list[float]]:
    found = (tensor for tensor in reader.tensors if tensor.name in DIVISORS)
    return {tensor.name: [_float(value) for value in tensor.data] for tensor in found}


def _yarn(keys: Keys, factor: float, original: int) -> dict[str, Any]:
    rope = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
    for name in ("beta_fast", "beta_slow"):
        if f"rope.scaling.yarn_{name}" in keys:
            rope[name] = _float(keys.pop(f"rope.scaling.yarn_{name}"))
    attention = _float(keys.pop("rope.scaling.attn_factor", 1.0))
    if attention != 1.0:
        # llama.cpp multiplies what YaRN computes from the factor; transformers expects the product.
        rope["attention_factor"] = attention * (0.1 * math.log(factor) + 1.0)
    return rope


def _long(
    keys: Keys, divisors: Mapping[str, list[float]], original: Any, values: Mapping[str, Any]
) -> dict[str, Any]:
    missing = [name for name in (LONG_FACTORS, SHORT_FACTORS) if name not in divisors]
    if missing or original is None:
        lacking = [*missing, *([] if original else ["rope.scaling.original_context_length"])]
        raise UnreadableGGUFError(f"rope.scaling.type = longrope without {', '.join(lacking)}")
    rope = {
        "rope_type": "longrope",
        "long_factor": divisors[LONG_FACTORS],
        "short_factor": divisors[SHORT_FACTORS],
        "original_max_position_embeddings": original,
    }
    attention = _float(keys.pop("rope.scaling.attn_factor", 1.0))
    longer = values["max_position_embeddings"] / original
    derived = math.sqrt(1 + math.log(longer) / math.log(original)) if longer > 1 else 1.0
    # Older versions of transformers reject a key that they derive themselves.
    return (
        rope
        if math.isclose(attention, derived, rel_tol=1e-6)
        else rope | {"attention_factor": attention}
    )


def _divided(divisors: list[float], base: float, values: Mapping[str, Any]) -> dict[str, Any]:
    """The scaling of given frequency divisors: Llama 3's if they match, or else one per
    frequency."""
    rope = {"rope_type": "llama3", "factor": max(divisors), **LLAMA_3}
    for original in (2**power for power in range(4, 21)):
        rope["original_max_position_embeddings"] = original
        found = llama3_divisors({**rope, "rope_theta": base}, 2 * len(divisors))
        if np.allclose(found, divisors, rtol=1e-6, atol=0):
            return rope
    return {
        "rope_type": "longrope",
        "long_factor": divisors,
        "short_factor": divisors,
        "attention_factor": 1.0,
        "original_max_position_embeddings": values["max_position_embeddings"],
    }


# --- keys of specific architectures ---------------------------------------------------------------


def _experts(keys: Keys, values: Mapping[str, Any], there: Family) -> dict[str, Any]:
    return {
        "num_experts": _one(keys, "expert_count"),
        "num_experts_per_tok": _one(keys, "expert_used_count"),
        "moe_intermediate_size": _one(keys, "expert_feed_forward_length"),
        "norm_topk_prob": True,
        "mlp_only_layers": [],
        "decoder_sparse_step": 1,
    }


def _granite(keys: Keys, values: Mapping[str, Any], there: Family) -> dict[str, Any]:
    if keys.get("rope.scaling.finetuned", True) is False:
        raise UnreadableGGUFError(
            "Granite without rotary embeddings (rope.scaling.finetuned = False) is not supported"
        )
    size = values.get("head_dim") or values["hidden_size"] // values["num_attention_heads"]
    return {
        "attention_multiplier": _float(keys.pop("attention.scale", 0.0)) or size**-0.5,
        "embedding_multiplier": _float(keys.pop("embedding_scale", 0.0)) or 1.0,
        "residual_multiplier": _float(keys.pop("residual_scale", 0.0)) or 1.0,
        "logits_scaling": _float(keys.pop("logit_scale")),
    }


def _phi3(keys: Keys, values: Mapping[str, Any], there: Family) -> dict[str, Any]:
    rope = values["rope_parameters"]
    return {
        "sliding_window": keys.pop("attention.sliding_window", 0) or None,
        "original_max_position_embeddings": rope.get("original_max_position_embeddings")
        or values["max_position_embeddings"],
    }


def _smollm3(keys: Keys, values: Mapping[str, Any], there: Family) -> dict[str, Any]:
    rotated = all_but_last(there.rope_period, values["num_hidden_layers"])
    return {"no_rope_layers": list(map(int, rotated))}


def _ministral3(keys: Keys, values: Mapping[str, Any], there: Family) -> dict[str, Any]:
    rope = dict(values["rope_parameters"])
    rope["llama_4_scaling_beta"] = _float(keys.pop("attention.temperature_scale", 0.0))
    rope.setdefault("original_max_position_embeddings", values["max_position_embeddings"])
    everywhere = _float(keys.pop("rope.scaling.yarn_log_multiplier", 0.0))
    if everywhere:
        rope |= {"mscale": 1.0, "mscale_all_dim": everywhere}
    return {"rope_parameters": rope, "sliding_window": None}


def _gemma2(keys: Keys, values: Mapping[str, Any], there: Family) -> dict[str, Any]:
    return {
        **_windows(keys, values, there, keys.pop("attention.sliding_window", 4096)),
        "attn_logit_softcapping": _float(keys.pop("attn_logit_softcapping", 50.0)),
        "final_logit_softcapping": _float(keys.pop("final_logit_softcapping", 30.0)),
    }


def _gemma3(keys: Keys, values: Mapping[str, Any], there: Family) -> dict[str, Any]:
    base = _float(keys.pop("rope.freq_base_swa", 10000.0))
    return {
        **_windows(keys, values, there, keys.pop("attention.sliding_window")),
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": base},
            "full_attention": values["rope_parameters"],
        },
        "attn_logit_softcapping": None,
        "final_logit_softcapping": _float(keys.pop("final_logit_softcapping", 0.0)) or None,
    }


def _windows(keys: Keys, values: Mapping[str, Any], there: Family, window: int) -> dict[str, Any]:
    layers = values["num_hidden_layers"]
    pattern = keys.pop("attention.sliding_window_pattern", there.window_period)
    if not isinstance(pattern, list):
        pattern = all_but_last(pattern, layers)
    scaled_by = values["head_dim"]
    if layers == there.width_scaled_layers:
        scaled_by = values["hidden_size"] // values["num_attention_heads"]
    return {
        "sliding_window": window,
        "layer_types": ["sliding_attention" if seen else "full_attention" for seen in pattern],
        "query_pre_attn_scalar": scaled_by,
    }


MORE: dict[str, Callable[[Keys, Mapping[str, Any], Family], dict[str, Any]]] = {
    "qwen3_moe": _experts,
    "granite": _granite,
    "phi3": _phi3,
    "smollm3": _smollm3,
    "ministral3": _ministral3,
    "gemma2": _gemma2,
    "gemma3_text": _gemma3,
}
"""Readers of architecture-specific keys, by model type."""

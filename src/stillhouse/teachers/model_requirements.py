"""Requirements on a causal language model's configuration, whether or not it is loaded yet."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES
from transformers.quantizers.auto import AutoHfQuantizer
from transformers.utils import GENERATION_CONFIG_NAME

from stillhouse.errors import ModelError
from stillhouse.teachers.older_names import with_older_names
from stillhouse.teachers.quiet import quiet

MOST_LAYERS = 2000
INSTEAD = (
    "use the unquantized model or a .gguf file of it, or run it in vLLM "
    "(signals.vllm, signals.server, synthesize.teacher)"
)


NEUTRAL: dict[str, tuple[object, ...]] = {
    "sliding_window": (0,),
    "attn_logit_softcapping": (0,),
    "final_logit_softcapping": (0,),
    "query_pre_attn_scalar": (),
    "attention_multiplier": (),
    "embedding_multiplier": (1,),
    "residual_multiplier": (1,),
    "logits_scaling": (1,),
    "logit_scale": (1,),
    "lm_head_multiplier": (1,),
    "scale_emb": (1,),
    "scale_depth": (),
    "clip_qkv": (0,),
    "alibi": (False,),
    "use_qk_norm": (False,),
    "no_rope_layers": ([],),
    "no_rope_layer_interval": (0,),
    "n_group": (1,),
    "routed_scaling_factor": (1,),
    "shared_kv_layers": (0,),
    "partial_rotary_factor": (1,),
    "rotary_pct": (1,),
}
"""Keys of config.json that change a model's output if its class reads them, with the values (other
than null) that have no effect."""


def require_known_keys(config: Any, raw: dict[str, Any], where: object = None) -> None:
    """Raise ModelError for a key of config.json that transformers would ignore.

    raw: the file's content. Other programs can read the key, and the weights may depend on it.
    """
    holder = config.get_text_config()
    keys = raw if holder is config else raw.get("text_config")
    kind = type(holder)
    # Code that comes with a model can read any key.
    if not isinstance(keys, dict) or not kind.__module__.startswith("transformers."):
        return
    require_rope(keys, where)
    with quiet():
        known = {*kind.attribute_map, *vars(kind())}
    for key in NEUTRAL.keys() & keys.keys() - known:
        value = keys[key]
        unused = key == "sliding_window" and keys.get("use_sliding_window") is False
        if value is None or value in NEUTRAL[key] or unused or hasattr(kind, key):
            continue
        if key in _OF_SOME_MODELS and (_scales(keys) or _model_reads(kind, key)):
            continue
        raise ModelError(
            f"config.json has {key}: {value}, which transformers ignores for models of type "
            f"{holder.model_type}",
            where=where,
            fix="if the model was trained with it, set a model_type that supports it; otherwise "
            f"remove {key} from config.json",
        )


_OF_SOME_MODELS = ("partial_rotary_factor", "rotary_pct")
"""Keys that configurations move into `rope_parameters`, where only some models read them."""


def _scales(keys: dict[str, Any]) -> bool:
    """Whether the rotary embeddings have a scaling, which all models read."""
    rope = keys.get("rope_parameters") or keys.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type")) if isinstance(rope, dict) else None
    return kind not in (None, "default")


def _model_reads(kind: type, key: str) -> bool:
    """Whether the source code of a configuration's model mentions a key."""
    folder = Path(inspect.getfile(kind)).parent
    sources = [*folder.glob("modeling_*.py"), *folder.glob("configuration_*.py")]
    return any(key in file.read_text(encoding="utf-8") for file in sources)


def require_loadable(config: Any, where: object = None) -> None:
    """Raise ModelError if no causal language model with this configuration can be loaded here."""
    require_layers(config, where)
    require_decoder(config, where)
    require_quantization(config, where)
    require_padding(config, where)


def require_windows(config: Any, where: object = None) -> None:
    """Raise ModelError for sliding-window layers without a window size."""
    text = config.get_text_config()
    kinds = getattr(text, "layer_types", None) or []
    if "sliding_attention" in kinds and not getattr(text, "sliding_window", None):
        raise ModelError(
            "layer_types has sliding-window layers, but sliding_window is not set",
            where=where,
            fix="set sliding_window in config.json, or copy the model's own config.json again",
        )


def require_layers(config: Any, where: object = None) -> None:
    """Raise ModelError for more layers than any model has, which would take hours to build."""
    layers = getattr(config.get_text_config(), "num_hidden_layers", None)
    if isinstance(layers, int) and layers > MOST_LAYERS:
        raise ModelError(
            f"num_hidden_layers is {layers:,}, but the maximum is {MOST_LAYERS:,}",
            where=where,
            fix="correct it in config.json, or copy the model's own config.json again",
        )


def require_decoder(config: Any, where: object = None) -> None:
    """Raise ModelError for encoders, which see the tokens to be predicted, and for encoder-decoder
    models."""
    kind = getattr(config, "model_type", "")
    masked = kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False)
    directions = getattr(config.get_text_config(), "use_bidirectional_attention", None)
    if getattr(config, "is_encoder_decoder", False):
        what = "an encoder-decoder, not a causal language model"
    elif masked or directions in (True, "all") or getattr(config, "is_causal", True) is False:
        what = "an encoder, which sees the tokens it should predict"
    else:
        return
    raise ModelError(
        f"a model of type {kind} is {what}",
        where=where,
        fix="use a decoder-only model, such as Llama, Qwen, Gemma, Mistral, or GPT-2",
    )


def require_quantization(config: Any, where: object = None) -> None:
    """Raise ModelError for a quantization that cannot be loaded on this machine."""
    settings = getattr(config, "quantization_config", None)
    if settings is None:
        return
    settings = settings if isinstance(settings, dict) else settings.to_dict()
    method = settings.get("quant_method", "an unknown method")
    try:
        with quiet():
            quantizer = AutoHfQuantizer.from_config(settings, pre_quantized=True)
            quantizer.validate_environment(device_map=None)
    except Exception as error:
        problem = str(error).split(" - supported types")[0].strip().splitlines()[0][:300]
        installable = isinstance(error, ImportError) and "GPU" not in str(error)
        raise ModelError(
            f"the model is quantized with {method}, which cannot be loaded here ({problem})",
            where=where,
            fix=INSTEAD + ("; or install what is missing" if installable else ""),
        ) from error


def require_padding(config: Any, where: object = None) -> None:
    """Raise ModelError for a padding token that has no embedding or is also an image token."""
    pad = getattr(config.get_text_config(), "pad_token_id", None)
    rows = getattr(config.get_text_config(), "vocab_size", None)
    if isinstance(pad, int) and isinstance(rows, int) and not 0 <= pad < rows:
        raise ModelError(
            f"pad_token_id is {pad}, but the model's token ids are 0 to {rows - 1}",
            where=where,
            fix="set pad_token_id in config.json to the tokenizer's padding or end token",
        )
    for key in ("image_token_id", "image_token_index", "video_token_id", "audio_token_id"):
        if isinstance(pad, int) and pad == getattr(config, key, None):
            raise ModelError(
                f"pad_token_id and {key} are both {pad}, so padding would be read as an image",
                where=where,
                fix="set pad_token_id in config.json to the tokenizer's end token",
            )


def require_tokens(config: Any, model: Any, where: object = None) -> None:
    """Raise ModelError for an end token without an embedding, which could never be generated, so
    no text would end."""
    rows = model.get_input_embeddings().num_embeddings
    generation = getattr(model, "generation_config", None)
    for file, holder in (
        ("config.json", config.get_text_config()),
        (GENERATION_CONFIG_NAME, generation),
    ):
        ends = getattr(holder, "eos_token_id", None)
        ends = ends if isinstance(ends, list) else [ends]
        known = [end for end in ends if end is not None]
        if known and not any(isinstance(end, int) and 0 <= end < rows for end in known):
            raise ModelError(
                f"eos_token_id is {known}, but the model's token ids are 0 to {rows - 1}",
                where=where,
                fix=f"set eos_token_id in {file} to the tokenizer's end token",
            )


# --- rotary embeddings ----------------------------------------------------------------------------

_OLDER = (
    "rope_theta", "rope_scaling", "rope_local_base_freq", "rotary_emb_base", "rotary_pct",
    "partial_rotary_factor", "global_rope_theta", "local_rope_theta",
)  # fmt: skip
_POSITIVE = (
    "rope_theta", "factor", "attention_factor", "partial_rotary_factor", "beta_fast", "beta_slow",
    "low_freq_factor", "high_freq_factor", "short_factor", "long_factor",
    "original_max_position_embeddings",
)  # fmt: skip


def require_rope(keys: Mapping[str, Any], where: object = None) -> None:
    """Raise ModelError for keys of config.json that contradict each other, a scaling without a
    type, or numbers that are not positive. keys: the text model's.

    transformers 5 reads `rope_parameters`, and older names alongside it only in part. If the two
    have different values, programs differ in which one they use.
    """
    rope = keys.get("rope_parameters")
    if isinstance(rope, dict) and rope:
        _require_one_value(keys, where)
    for found in _ropes(keys):
        kind = found.get("rope_type", found.get("type"))
        if kind in (None, "default") and found.get("factor") not in (None, 1):
            raise ModelError(
                f"config.json scales rotary embeddings by a factor ({found['factor']}) without a "
                "rope_type, so transformers ignores the factor",
                where=where,
                fix="add the rope_type (linear, dynamic, yarn, ...), or remove the factor",
            )
    for found in ({key: keys.get(key) for key in _OLDER}, *_ropes(keys)):
        for key in found.keys() & set(_POSITIVE):
            if not _is_positive(found[key]):
                raise ModelError(
                    f"{key} must be a positive number, but is {found[key]!r}",
                    where=where,
                    fix="correct it, or copy the model's own config.json again",
                )


def _require_one_value(keys: Mapping[str, Any], where: object) -> None:
    try:
        older = with_older_names({key: keys[key] for key in keys.keys() - set(_OLDER)})
    except (KeyError, TypeError, AttributeError):
        return  # transformers' own error about rope_parameters says more
    older.setdefault("rope_scaling", {"rope_type": "default"})
    for key in _OLDER:
        if keys.get(key) and key in older and not _agree(keys[key], older[key]):
            raise ModelError(
                f"config.json has two different rotary embeddings: {key} is {keys[key]}, and "
                f"rope_parameters is {keys['rope_parameters']}",
                where=where,
                fix=f"write the values that the model was trained with into rope_parameters, and "
                f"remove {key}",
            )


def _agree(one: Any, other: Any) -> bool:
    """Whether two values are equal, or two scalings in all keys that they share."""
    if not isinstance(one, Mapping) or not isinstance(other, Mapping):
        return bool(one == other)
    kinds = [found.get("rope_type", found.get("type", "default")) for found in (one, other)]
    common = (one.keys() & other.keys()) - {"type", "rope_type"}
    same = all(one[key] == other[key] for key in common)
    # Qwen2-VL's `mrope` is the default rotation, applied to several positions.
    return same and (kinds[0] == kinds[1] or set(kinds) == {"default", "mrope"})


def _ropes(keys: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The rotary embeddings, which can be separate for each kind of layer."""
    for key in ("rope_parameters", "rope_scaling"):
        found = keys.get(key)
        if isinstance(found, dict):
            nested = [value for value in found.values() if isinstance(value, dict)]
            yield from nested or [found]


def _is_positive(value: Any) -> bool:
    """Whether a value, or each value of a list, is a positive number or None."""
    if isinstance(value, list):
        return all(map(_is_positive, value))
    if value is None:
        return True
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and math.isfinite(value) and value > 0

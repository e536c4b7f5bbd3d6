"""Model folders that transformers 4 reads in the same way as transformers 5.

For example, version 5 keeps all settings of a rotary embedding in `rope_parameters`. Version 4, and
servers and converters based on it, look for the older names and silently use a base of 10,000
without them. Version 5 also reads the older names.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

SLIDING_BASE = {"modernbert": "local_rope_theta", "modernbert-decoder": "local_rope_theta"}
FULL_BASE = {
    "modernbert": "global_rope_theta",
    "modernbert-decoder": "global_rope_theta",
    "gpt_neox": "rotary_emb_base",
    "gpt_neox_japanese": "rotary_emb_base",
}
ROTATED_SHARE = {"gpt_neox": "rotary_pct", "gpt_neox_japanese": "rotary_pct"}
"""Names that differ for some model types, by model type."""
SCALED_BY_LAYER = ("gemma3_text", "gemma3n_text", "olmo3")
"""Model types with a rotary embedding for each kind of layer whose `rope_scaling` applies only to
layers without a window. For other types, version 5 would apply it to every layer."""
FRAMED_BY_CLASS = {f"{name}Tokenizer" for name in ("Llama", "CodeLlama", "Gemma", "Cohere")}
"""Classes that in version 4 prepend a token to every text unless the configuration disables it,
regardless of tokenizer.json."""


def write_older_names(folder: Path) -> None:
    """Add the older names to the folder's config.json, alongside the newer ones."""
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    text = json.dumps(with_older_names(config), indent=2, sort_keys=True, ensure_ascii=False)
    file.write_text(text + "\n", encoding="utf-8")


def with_older_names(config: dict[str, Any]) -> dict[str, Any]:
    """`config` with rope_theta, rope_scaling, and so on alongside every `rope_parameters`.

    If layers with a window have a separate rotary embedding, `rope_theta` and `rope_scaling`
    apply to the other layers, as in version 4.
    """
    found = dict(config)
    if isinstance(config.get("text_config"), dict):
        found["text_config"] = with_older_names(config["text_config"])
    if "dtype" in found:
        found["torch_dtype"] = found["dtype"]
    if "num_local_experts" in found:  # Qwen 3 with experts
        found.setdefault("num_experts", found["num_local_experts"])
    ropes = found.get("rope_parameters") or {}
    kind = found.get("model_type", "")
    sliding = ropes.get("sliding_attention")
    if sliding:
        found[SLIDING_BASE.get(kind, "rope_local_base_freq")] = sliding["rope_theta"]
    rope = ropes.get("full_attention", ropes) or {}  # None: layers without positions
    if "rope_theta" not in rope:
        return found
    found[FULL_BASE.get(kind, "rope_theta")] = rope["rope_theta"]
    if "partial_rotary_factor" in rope and rope is ropes:
        found[ROTATED_SHARE.get(kind, "partial_rotary_factor")] = rope["partial_rotary_factor"]
    if rope["rope_type"] != "default" and (rope is ropes or kind in SCALED_BY_LAYER):
        found["rope_scaling"] = _scaling(rope, kind)
    if rope["rope_type"] == "longrope":
        found["original_max_position_embeddings"] = rope["original_max_position_embeddings"]
    return found


def _scaling(rope: dict[str, Any], kind: str) -> dict[str, Any]:
    elsewhere = {"rope_theta", "partial_rotary_factor"}
    if kind == "phi3":  # which requires three keys
        elsewhere |= {"original_max_position_embeddings", "rope_type"}
        rope = {"type": rope["rope_type"], **rope}
    return {key: value for key, value in rope.items() if key not in elsewhere}


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Save a tokenizer with names that every version reads, and without its loading options."""
    tokenizer.save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    for key in ("backend", "is_local", "local_files_only"):
        config.pop(key, None)
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(config.get("extra_special_tokens"), list):
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    if str(config.get("tokenizer_class")).removesuffix("Fast") in FRAMED_BY_CLASS:
        ids = tokenizer("a")["input_ids"]
        config["add_bos_token"] = ids[:1] == [tokenizer.bos_token_id]
        config["add_eos_token"] = ids[-1:] == [tokenizer.eos_token_id]
    file.write_text(json.dumps(config, indent=2, ensure_ascii=False), encoding="utf-8")

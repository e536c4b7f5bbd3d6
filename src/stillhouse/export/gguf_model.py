"""A Hugging Face model's configuration and tensors under the names that GGUF has for them.

llama.cpp computes rotary embeddings of neighbouring pairs where transformers turns a head's first
half against its second; for the Llama architecture the rows of the query and key products are
therefore reordered, for the others llama.cpp does as transformers.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import gguf
import numpy as np

from stillhouse.errors import ModelError

Array = np.ndarray[Any, Any]

ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "mistral": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
}
"""transformers' model types, as GGUF architectures that both loaders (llama.cpp's and
transformers') read."""


def architecture(config: Any) -> gguf.MODEL_ARCH:
    """Raises ModelError: an architecture, or a feature of it, that the writer does not know."""
    found = ARCHITECTURES.get(config.model_type)
    if found is None:
        raise _unsupported(f"the architecture {config.model_type}")
    if config.hidden_act != "silu":
        raise _unsupported(f"the activation {config.hidden_act}")
    rope = config.rope_parameters or {}
    if rope.get("rope_type", "default") != "default":
        raise _unsupported(f"rotary embeddings scaled by {rope['rope_type']}")
    windowed = config.model_type == "mistral" or getattr(config, "use_sliding_window", False)
    if windowed and getattr(config, "sliding_window", None) is not None:
        raise _unsupported("sliding-window attention")
    return found


def _unsupported(what: str) -> ModelError:
    return ModelError(
        f"the GGUF writer does not know {what}",
        where="export.formats",
        fix=f"it writes {', '.join(ARCHITECTURES)} with plain rotary embeddings; for others export "
        "safetensors, and convert that folder with llama.cpp's convert_hf_to_gguf.py",
    )


def head_size(config: Any) -> int:
    return int(
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )


def add_configuration(writer: gguf.GGUFWriter, config: Any) -> None:
    """The shapes and constants that a runtime needs to build the model."""
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(float((config.rope_parameters or {}).get("rope_theta", 10000.0)))
    writer.add_rope_dimension_count(head_size(config))
    writer.add_key_length(head_size(config))
    writer.add_value_length(head_size(config))
    writer.add_vocab_size(config.vocab_size)


def gguf_names(names: Iterable[str], config: Any) -> dict[str, str]:
    """Each tensor's name in the file. Raises ModelError: the architecture has no such tensor."""
    known = gguf.get_tensor_name_map(architecture(config), config.num_hidden_layers)
    found = {name: known.get_name(name, try_suffixes=(".weight", ".bias")) for name in names}
    unknown = sorted(name for name, there in found.items() if there is None)
    if unknown:
        raise _unsupported(f"the tensor {unknown[0]} in a model of type {config.model_type}")
    return found


def for_gguf(name: str, tensor: Array, config: Any) -> Array:
    """The tensor with its rows in llama.cpp's order. Rows move whole; columns never do."""
    if architecture(config) is not gguf.MODEL_ARCH.LLAMA:
        return tensor
    part = name.split(".")[-2]
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(part)
    if heads is None:
        return tensor
    rest = tensor.shape[1:]
    halves = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *rest)
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(tensor.shape)

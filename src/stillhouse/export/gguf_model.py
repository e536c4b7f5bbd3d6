"""A Hugging Face model's architecture and tensors under the names that GGUF has for them.

For some architectures llama.cpp rotates neighboring pairs where transformers rotates a head's first
half against its second: there the rows of the query and key products are reordered. It adds nothing
to a norm's gain, so where an architecture multiplies by 1 + gain, the file has 1 + gain.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import gguf
import numpy as np

from stillhouse.errors import ModelError

Array = np.ndarray[Any, Any]

ROPE_FACTORS = "rope.freqs.weight"
"""What each rotary frequency is divided by: not a tensor of the checkpoint, but of the file."""

QKV = frozenset({"q_proj", "k_proj", "v_proj"})
ATTENTION = QKV | {"o_proj"}
FFN = frozenset({"gate_proj", "up_proj", "down_proj"})


@dataclass(frozen=True)
class Family:
    """What llama.cpp computes for a GGUF architecture.

    paired: rotary embeddings of neighboring pairs. activation: of the FFN. norm_offset: is added to
    norms' gains. ropes: rotary scalings that it reads. biases: parts that may have one.
    window_period: of every so many layers, all but the last see a window (0: all see everything); a
    list in the file overrides it. whole_layers: with this many layers, attention is scaled by
    hidden_size / heads instead of the head's size (0: never). rope_period: every so many layers,
    one has no rotary embedding, and nothing in the file can change that.
    """

    arch: gguf.MODEL_ARCH
    paired: bool = False
    activation: str = "silu"
    norm_offset: float = 0.0
    ropes: tuple[str, ...] = ("default", "linear", "yarn")
    biases: frozenset[str] = frozenset()
    window_period: int = 0
    whole_layers: int = 0
    rope_period: int = 0


_LLAMA = Family(
    gguf.MODEL_ARCH.LLAMA,
    paired=True,
    ropes=("default", "linear", "llama3", "yarn"),
    biases=ATTENTION | FFN,
)
_GEMMA = Family(
    gguf.MODEL_ARCH.GEMMA, activation="gelu_pytorch_tanh", norm_offset=1.0, ropes=("default",)
)

ARCHITECTURES = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "ministral": _LLAMA,
    "ministral3": replace(_LLAMA, arch=gguf.MODEL_ARCH.MISTRAL3),
    "smollm3": Family(gguf.MODEL_ARCH.SMOLLM3, paired=True, biases=QKV, rope_period=4),
    "qwen2": Family(gguf.MODEL_ARCH.QWEN2, biases=QKV),
    "qwen3": Family(gguf.MODEL_ARCH.QWEN3),
    "qwen3_moe": Family(gguf.MODEL_ARCH.QWEN3MOE),
    "gemma": _GEMMA,
    "gemma2": replace(_GEMMA, arch=gguf.MODEL_ARCH.GEMMA2, window_period=2, whole_layers=46),
    "gemma3_text": replace(
        _GEMMA,
        arch=gguf.MODEL_ARCH.GEMMA3,
        ropes=("default", "linear"),
        window_period=6,
        whole_layers=62,
    ),
}
"""By transformers' model type: the GGUF architecture that llama.cpp computes alike."""


def family(config: Any) -> Family:
    """The file's architecture. A Qwen 2 whose heads do not fill its width is written as a Llama
    with biases, since llama.cpp's Qwen 2 has no other head size, and the rest is the same.

    Raises ModelError: an architecture, or a feature of it, that llama.cpp or the writer lacks.
    """
    found = ARCHITECTURES.get(config.model_type)
    if found is None:
        raise unsupported(f"the architecture {config.model_type}")
    if config.model_type == "qwen2" and not heads_fill_the_width(config):
        found = _LLAMA
    for lacking in _lacks(config, found):
        raise unsupported(lacking)
    return found


def architecture(config: Any) -> gguf.MODEL_ARCH:
    """Raises ModelError as `family`."""
    return family(config).arch


def _lacks(config: Any, found: Family) -> Iterator[str]:
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    if activation != found.activation:
        yield f"the activation {activation} in a {config.model_type}"
    for layers, rope in ropes(config).items():
        allowed = ("default",) if layers == "sliding_attention" else found.ropes
        if rope["rope_type"] not in allowed:
            yield f"rotary embeddings of a {config.model_type} scaled by {rope['rope_type']}"
        if not rope.get("truncate", True) or rope.get("attention_factor") is not None:
            yield "rotary embeddings with an attention_factor of their own"
        if rope.get("mscale", 1) not in (0, 1):
            yield f"rotary embeddings with mscale {rope['mscale']}"
    if not found.window_period and any(windows(config)):
        yield f"sliding-window attention in a {config.model_type}"
    extra = sorted(biased_parts(config) - found.biases)
    if extra:
        yield f"a bias of {extra[0]} in a {config.model_type}"
    yield from _lacks_of_layers(config, found)
    if getattr(config, "num_experts", 0):
        if not config.norm_topk_prob:
            yield "experts whose weights do not add up to 1 (norm_topk_prob: false)"
        if config.mlp_only_layers or config.decoder_sparse_step != 1:
            yield "layers without experts between layers that have them"


def _lacks_of_layers(config: Any, found: Family) -> Iterator[str]:
    """What llama.cpp derives from the number of layers, or from a layer's place among them."""
    if found.rope_period and list(config.no_rope_layers) != rope_pattern(config, found):
        yield (
            f"a {config.model_type} in which other layers than every {found.rope_period}th have no "
            "rotary embedding (as after a cut in depth): llama.cpp has that pattern built in"
        )
    if not found.window_period:
        return
    whole = config.num_hidden_layers == found.whole_layers
    scaled_by = config.hidden_size // config.num_attention_heads if whole else head_size(config)
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
        f"the GGUF writer does not know {what}",
        where="export.formats",
        fix=f"it writes {', '.join(ARCHITECTURES)} (docs/quantize.md says which features of them); "
        "for others export safetensors, and see whether llama.cpp's convert_hf_to_gguf.py knows it",
    )


def unknown_tokenizer(kind: str) -> ModelError:
    return ModelError(
        f"the GGUF writer does not know this tokenizer: it is {kind}",
        where="export.formats",
        fix="byte-level BPE as in GPT-2, SmolLM, Llama 3 and Qwen can be written, and BPE with "
        "byte fallback as in Llama 2, Mistral and Gemma; for others export safetensors, and "
        "convert that folder with llama.cpp's convert_hf_to_gguf.py",
    )


def head_size(config: Any) -> int:
    return int(
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )


def heads_fill_the_width(config: Any) -> bool:
    return head_size(config) * int(config.num_attention_heads) == int(config.hidden_size)


def ropes(config: Any) -> dict[str, dict[str, Any]]:
    """Rotary embeddings by kind of layer; most architectures have one kind, full_attention."""
    found = config.rope_parameters or {}
    by_layers = {kind: rope for kind, rope in found.items() if isinstance(rope, dict)}
    default = {"rope_type": "default", "rope_theta": 10000.0}
    return {kind: default | rope for kind, rope in (by_layers or {"full_attention": found}).items()}


def windows(config: Any) -> list[int]:
    """How many tokens each layer sees; 0: the whole context."""
    size = getattr(config, "sliding_window", None) or 0
    if size >= config.max_position_embeddings or not getattr(config, "use_sliding_window", True):
        size = 0
    # Mistral has a window in every layer, and no list.
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    return [size if kind == "sliding_attention" else 0 for kind in kinds]


def window_pattern(config: Any) -> list[bool]:
    """Which layers are of the kind with a window, whether or not the context is longer."""
    return [kind == "sliding_attention" for kind in config.layer_types]


def built_in_windows(config: Any, found: Family) -> list[bool]:
    """The pattern that llama.cpp uses where the file has none."""
    return [(layer + 1) % found.window_period != 0 for layer in range(config.num_hidden_layers)]


def rope_pattern(config: Any, found: Family) -> list[int]:
    """1 for each layer that llama.cpp gives a rotary embedding."""
    return [int((layer + 1) % found.rope_period != 0) for layer in range(config.num_hidden_layers)]


def biased_parts(config: Any) -> frozenset[str]:
    found = QKV if config.model_type == "qwen2" else frozenset()
    if getattr(config, "attention_bias", False):
        found |= ATTENTION
    return found | FFN if getattr(config, "mlp_bias", False) else found


def rope_factors(config: Any) -> Array | None:
    """The divisor of each rotary frequency of a Llama 3, [head size / 2]; None for other models.

    Long waves are slowed by `factor`, short ones not at all, and between the two bounds the share
    of each grows with the number of waves in the original context.
    """
    rope = ropes(config)["full_attention"]
    if rope["rope_type"] != "llama3":
        return None
    size = head_size(config)
    frequencies = rope["rope_theta"] ** -(np.arange(0, size, 2, dtype=np.float64) / size)
    waves = rope["original_max_position_embeddings"] * frequencies / (2 * np.pi)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    kept = np.clip((waves - low) / (high - low), 0, 1)
    return (1 / (kept + (1 - kept) / rope["factor"])).astype(np.float32)


def gguf_names(names: Iterable[str], config: Any) -> dict[str, str]:
    """Each tensor's name in the file. Raises ModelError: the architecture has no such tensor."""
    known = gguf.get_tensor_name_map(architecture(config), config.num_hidden_layers)
    found = {name: known.get_name(name, try_suffixes=(".weight", ".bias")) for name in names}
    unknown = sorted(name for name, there in found.items() if there is None)
    if unknown:
        raise unsupported(f"the tensor {unknown[0]} in a model of type {config.model_type}")
    return found


def for_gguf(name: str, tensor: Array, config: Any) -> Array:
    """The tensor as llama.cpp reads it. Whole rows are moved; columns never are."""
    there = family(config)
    if there.norm_offset and name.endswith("norm.weight"):
        return tensor + np.float32(there.norm_offset)
    part = name.split(".")[-2]
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(part)
    if heads is None or not there.paired:
        return tensor
    rest = tensor.shape[1:]
    halves = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *rest)
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(tensor.shape)

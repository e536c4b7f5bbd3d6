"""How llama.cpp computes the GGUF architectures that can be read and written.

For some architectures, llama.cpp rotates neighboring pairs where transformers rotates a head's
first half against its second, so the rows of the query and key projections are in a different
order. llama.cpp adds nothing to a norm's gain: if an architecture multiplies by 1 + gain, the file
stores 1 + gain.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import gguf
import numpy as np

Array = np.ndarray[Any, Any]

ROPE_FACTORS = "rope_freqs.weight"
LONG_FACTORS, SHORT_FACTORS = "rope_factors_long.weight", "rope_factors_short.weight"
DIVISORS = ROPE_FACTORS, LONG_FACTORS, SHORT_FACTORS
"""Divisors of the rotary frequencies: tensors in the file, but not in a checkpoint."""

QKV = frozenset({"q_proj", "k_proj", "v_proj"})
ATTENTION = QKV | {"o_proj"}
FFN = frozenset({"gate_proj", "up_proj", "down_proj"})


@dataclass(frozen=True)
class Family:
    """How llama.cpp computes a GGUF architecture.

    paired: rotary embeddings rotate neighboring pairs. activation: of the FFN. norm_offset: added
    to the norms' gains. ropes: supported rotary scalings. biases: projections that can have a bias.
    window_period: all but the last of every `window_period` layers use sliding-window attention (0:
    none do); a list in the file overrides it. width_scaled_layers: a model with this many layers
    scales attention by hidden_size / heads instead of the head size (0: none does). rope_period:
    the last of every `rope_period` layers has no rotary embedding, which no key in the file can
    change. partly_rotated: part of each head can stay unrotated.
    """

    arch: gguf.MODEL_ARCH
    paired: bool = False
    activation: str = "silu"
    norm_offset: float = 0.0
    ropes: tuple[str, ...] = ("default", "linear", "yarn")
    biases: frozenset[str] = frozenset()
    window_period: int = 0
    width_scaled_layers: int = 0
    rope_period: int = 0
    partly_rotated: bool = False

    @property
    def name(self) -> str:
        """The architecture's name in the file."""
        return str(gguf.MODEL_ARCH_NAMES[self.arch])


LLAMA = Family(
    gguf.MODEL_ARCH.LLAMA,
    paired=True,
    ropes=("default", "linear", "llama3", "yarn", "longrope"),
    biases=ATTENTION | FFN,
)
_GEMMA = Family(
    gguf.MODEL_ARCH.GEMMA, activation="gelu_pytorch_tanh", norm_offset=1.0, ropes=("default",)
)

ARCHITECTURES = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "ministral": LLAMA,
    "ministral3": replace(LLAMA, arch=gguf.MODEL_ARCH.MISTRAL3),
    "granite": replace(LLAMA, arch=gguf.MODEL_ARCH.GRANITE),
    "smollm3": Family(gguf.MODEL_ARCH.SMOLLM3, paired=True, biases=QKV, rope_period=4),
    "qwen2": Family(gguf.MODEL_ARCH.QWEN2, biases=QKV),
    "qwen3": Family(gguf.MODEL_ARCH.QWEN3),
    "qwen3_moe": Family(gguf.MODEL_ARCH.QWEN3MOE),
    "olmo2": Family(gguf.MODEL_ARCH.OLMO2),
    "phi3": Family(gguf.MODEL_ARCH.PHI3, ropes=("default", "longrope"), partly_rotated=True),
    "gemma": _GEMMA,
    "gemma2": replace(_GEMMA, arch=gguf.MODEL_ARCH.GEMMA2, window_period=2, width_scaled_layers=46),
    "gemma3_text": replace(
        _GEMMA,
        arch=gguf.MODEL_ARCH.GEMMA3,
        ropes=("default", "linear"),
        window_period=6,
        width_scaled_layers=62,
    ),
}
"""The equivalent GGUF architecture in llama.cpp, by transformers' model type."""

NAMES = tuple(dict.fromkeys(there.name for there in ARCHITECTURES.values()))
"""The architectures' names in files."""


def model_type(architecture: str) -> str | None:
    """The transformers model type of a file's architecture; None if there is no equivalent."""
    same = (kind for kind, there in ARCHITECTURES.items() if there.name == architecture)
    return next(same, None)


def all_but_last(period: int, layers: int) -> list[bool]:
    """For each layer, whether it is not the last of its period."""
    return [(layer + 1) % period != 0 for layer in range(layers)]


def llama3_divisors(rope: Mapping[str, Any], size: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """The divisor of each rotary frequency of Llama 3, [size / 2].

    Low frequencies are divided by `factor` and high ones not at all. Between the two bounds, the
    scaling is interpolated by the number of waves in the original context. rope: the model's
    `rope_parameters`. size: head size.
    """
    frequencies = rope["rope_theta"] ** -(np.arange(0, size, 2, dtype=np.float64) / size)
    waves = rope["original_max_position_embeddings"] * frequencies / (2 * np.pi)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    kept = np.clip((waves - low) / (high - low), 0, 1)
    divisors: np.ndarray[Any, np.dtype[np.float64]] = 1 / (kept + (1 - kept) / rope["factor"])
    return divisors


def to_file(there: Family, name: str, tensor: Array, config: Any) -> Array:
    """The tensor as llama.cpp expects it. Moves only whole rows, never columns."""
    if there.norm_offset and name.endswith("norm.weight"):
        return tensor + np.float32(there.norm_offset)
    return _swapped(there, name, tensor, config, (2, -1))


def from_file(there: Family, name: str, tensor: Array, config: Any) -> Array:
    """The tensor as transformers expects it: the inverse of `to_file`."""
    if there.norm_offset and name.endswith("norm.weight"):
        return tensor - np.float32(there.norm_offset)
    return _swapped(there, name, tensor, config, (-1, 2))


def _swapped(there: Family, name: str, tensor: Array, config: Any, sizes: tuple[int, int]) -> Array:
    """The tensor with the rows of each head, [*sizes], in the order of [*reversed(sizes)], if it is
    a query or key projection whose pairs are rotated."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    number = heads.get(name.split(".")[-2])
    if number is None or not there.paired:
        return tensor
    rows = tensor.reshape(number, *sizes, *tensor.shape[1:])
    return np.ascontiguousarray(rows.swapaxes(1, 2)).reshape(tensor.shape)

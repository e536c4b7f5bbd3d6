"""The formats that a model can be exported in, and how much their rounding may cost.

Limits are mean KL in nats/token (nats/text for a classifier) between the checkpoint and its export:
the maximum plausible cost of a format's rounding. A layer or a head that is not the
checkpoint's costs several nats. Recipes use these names, so this module imports no
library.
"""

from __future__ import annotations

from dataclasses import dataclass

FLOATS = {"float32": 1e-6, "bfloat16": 0.01}
"""Dtypes of a safetensors export. float32 holds the same weights; rounding SmolLM2-135M's
weights and products to bfloat16 costs 0.0009 on English prose."""

GGUF = {
    "f32": 1e-6,
    "f16": 0.001,
    "bf16": 0.01,
    "q8_0": 0.02,
    "q5_1": 0.3,
    "q5_0": 0.3,
    "q4_1": 1.0,
    "q4_0": 1.0,
    "mxfp4": 1.0,
    "tq2_0": 1.0,
    "tq1_0": 1.0,
}
"""Written by the gguf package's own quantizers. The ternary ones fit models trained for them."""

K_QUANTS = {
    "q2_k": 3.0,
    "q3_k_m": 1.5,
    "q4_k_s": 1.0,
    "q4_k_m": 1.0,
    "q5_k_m": 0.3,
    "q6_k": 0.1,
}
"""GGUF formats of llama.cpp's own quantizer."""


@dataclass(frozen=True)
class CompressedMethod:
    """A method of llm-compressor. groups: how many inputs may share a scale; the first
    that divides the rows of every matrix is used; () if there are no groups. Methods with groups
    choose their numbers by the layers' inputs, and so need text."""

    kl_limit: float
    groups: tuple[int, ...] = ()


COMPRESSED = {
    "gptq": CompressedMethod(1.0, (128, 64, 32)),
    "awq": CompressedMethod(1.0, (128, 64, 32)),
    "fp8": CompressedMethod(0.1),
    "nvfp4": CompressedMethod(1.0, (16,)),
}

ONNX = {"onnx": 1e-5, "onnx-int8": 0.1}
"""The same float32 numbers, or weights and inputs of products rounded to 8 bits."""

FORMATS = (
    "safetensors",
    *(f"gguf-{kind}" for kind in (*GGUF, *K_QUANTS)),
    *(f"compressed-{method}" for method in COMPRESSED),
)
"""Formats of a language model."""
CLASSIFIER_FORMATS = ("safetensors", *ONNX)

"""Formats that a model can be exported in, and how much their rounding can cost.

Limits are the mean KL between the checkpoint and its export, in nats/token (nats/text for a
classifier). They are the maximum plausible cost of a format's rounding; a wrong layer or head costs
several nats. Recipes use these names, so this module does not import any library.
"""

from __future__ import annotations

from dataclasses import dataclass

FLOATS = {"float32": 1e-6, "bfloat16": 0.01}
"""Dtypes of a safetensors export. float32 keeps the weights as they are; rounding SmolLM2-135M's
weights and products to bfloat16 costs 0.0009 nats/token on English prose."""

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
"""GGUF formats written by the gguf package's quantizers. Ternary formats (tq*) are for models that
were trained for them."""

K_QUANTS = {
    "q2_k": 3.0,
    "q3_k_m": 1.5,
    "q4_k_s": 1.0,
    "q4_k_m": 1.0,
    "q5_k_m": 0.3,
    "q6_k": 0.1,
}
"""GGUF formats written by llama.cpp's quantizer."""


@dataclass(frozen=True)
class CompressedMethod:
    """A quantization method of llm-compressor.

    groups: possible group sizes (numbers that share a scale); the first that divides the rows of
        every matrix is used. Empty if there are no groups. Methods with groups choose their numbers
        by the layers' inputs, so they need text.
    """

    kl_limit: float
    groups: tuple[int, ...] = ()


COMPRESSED = {
    "gptq": CompressedMethod(1.0, (128, 64, 32)),
    "awq": CompressedMethod(1.0, (128, 64, 32)),
    "fp8": CompressedMethod(0.1),
    "nvfp4": CompressedMethod(1.0, (16,)),
}

ONNX = {"onnx": 1e-5, "onnx-int8": 0.1}
"""onnx keeps float32 numbers; onnx-int8 rounds the weights and inputs of products to 8 bits."""

FORMATS = (
    "safetensors",
    *(f"gguf-{kind}" for kind in (*GGUF, *K_QUANTS)),
    *(f"compressed-{method}" for method in COMPRESSED),
)
"""Formats of a language model."""
CLASSIFIER_FORMATS = ("safetensors", *ONNX)

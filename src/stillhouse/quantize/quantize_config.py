"""The recipe section `quantize`, including quantization-aware training."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from stillhouse.field_types import Divergence, LearningRate, Tokens, Width
from stillhouse.section import Section


class QatRecipe(Section):
    """Quantization-aware distillation: train the student with its weights rounded."""

    tokens: Tokens = Field(30000, description="Approximate number of training tokens.")
    learning_rate: LearningRate = Field(
        2e-4,
        description="Learning rate; higher than in full precision, since weights must move far "
        "enough to round differently.",
    )


class QuantizeRecipe(Section):
    """Quantization of the trained student's matrices. Parts to leave alone can be chosen by
    measurement."""

    kind: Literal[
        "int8",
        "int4",
        "float8",
        "int8_dynamic_int8",
        "int8_dynamic_int4",
        "float8_dynamic_float8",
    ] = Field(
        "int4",
        description="Type of the weights. With *_dynamic_*, layer inputs are also rounded to 8 "
        "bits, per token, at inference. float8 is exported as safetensors (torchao).",
    )
    group_size: Width | None = Field(
        None,
        description="How many neighbors in a row share a scale; null: 32. float8 has one scale per "
        "row.",
    )
    keep: list[str] = Field(
        default=[],
        description="Parts to leave unquantized: embeddings, head, layers.N (counted from 0).",
    )
    max_kl: Divergence | None = Field(
        None,
        description="Leave the most sensitive parts unquantized, until the KL of quantizing the "
        "others is at most this, in nats/token.",
    )
    max_bytes: Tokens | None = Field(
        None,
        description="Maximum size of the model in bytes; the most sensitive parts stay unquantized "
        "as long as it fits.",
    )
    calibration_tokens: Tokens | None = Field(
        8192,
        description="Training tokens to measure the importance of inputs on, which weights the "
        "rounding error when scales are chosen; null: all inputs count equally.",
    )
    sensitivity_tokens: Tokens = Field(
        1024, description="Held-out tokens to measure sensitivity on."
    )
    qat: QatRecipe | None = Field(
        None, description="Train with rounded weights; null: only round the trained weights."
    )

    @property
    def bits(self) -> Literal[4, 8]:
        return 4 if self.kind.endswith("int4") else 8

    @property
    def dynamic(self) -> bool:
        return "_dynamic_" in self.kind

    @property
    def floating(self) -> bool:
        return self.kind.startswith("float8")

    @model_validator(mode="after")
    def _groups_fit_the_kind(self) -> QuantizeRecipe:
        if self.group_size is None:
            return self
        if self.floating:
            raise ValueError(f"{self.kind} has one scale per row: remove group_size")
        if self.bits + 16 / self.group_size >= 16:  # Bits per number, with its part of a scale.
            raise ValueError(
                f"with group_size: {self.group_size}, {self.kind} and its scales take at least 16 "
                "bits per number: use group_size: 32"
            )
        return self

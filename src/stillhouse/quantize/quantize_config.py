"""The recipe section `quantize`, with quantization-aware training."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from stillhouse.field_types import Divergence, LearningRate, Tokens, Width
from stillhouse.section import Section


class QatRecipe(Section):
    """Quantization-aware distillation: the student learns with its weights rounded."""

    tokens: Tokens = Field(30000, description="Training tokens, about.")
    learning_rate: LearningRate = Field(
        2e-4,
        description="Higher than in full precision: a weight must cross to another place.",
    )


class QuantizeRecipe(Section):
    """Quantization of the trained student's matrices; the parts to keep are chosen by
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
        description="Type of the weights; *_dynamic_*: the inputs of layers are also rounded to 8 "
        "bits, per token, at inference. float8 is exported as safetensors (torchao).",
    )
    group_size: Width | None = Field(
        None,
        description="Neighbors in a row that share a scale; null: 32. float8: one scale per row.",
    )
    keep: list[str] = Field(
        default=[], description="Parts to leave alone: embeddings, head, layers.N (0 the first)."
    )
    max_kl: Divergence | None = Field(
        None,
        description="Leave the most sensitive parts alone until the others cost at most this, in "
        "nats a token.",
    )
    max_bytes: Tokens | None = Field(
        None, description="Leave the most sensitive parts alone while the model fits."
    )
    calibration_tokens: Tokens | None = Field(
        8192,
        description="Training tokens on which the importance of each input is measured, which "
        "chooses the scales; null: all inputs count alike.",
    )
    sensitivity_tokens: Tokens = Field(
        1024, description="Held-out tokens on which sensitivity is measured."
    )
    qat: QatRecipe | None = Field(
        None, description="Train with rounded weights; null: only round the trained ones."
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
            raise ValueError(f"{self.kind} has one scale a row: leave group_size out")
        if self.bits + 16 / self.group_size >= 16:  # bits of a number, with its part of a scale
            raise ValueError(
                f"with group_size: {self.group_size} and its scales, {self.kind} is not smaller "
                "than 16 bits: use 32"
            )
        return self

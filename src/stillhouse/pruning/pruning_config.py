"""Recipe sections for pruning: the search for a shape, and how the parts to keep are chosen."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Literal, Self

from pydantic import Field, ValidationInfo, field_validator, model_validator

from stillhouse.errors import shown
from stillhouse.field_types import (
    Count,
    CountOrZero,
    PartialShare,
    PathText,
    SmallCount,
    Steps,
    Tokens,
    Width,
)
from stillhouse.pruning.sizes import AXES
from stillhouse.section import OneOf, Section

_COUNTS = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9, "g": 1e9}
_BYTES = {
    unit + suffix: factor
    for unit, factor in {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9}.items()
    for suffix in ("", "b")
} | {"kib": 2.0**10, "mib": 2.0**20, "gib": 2.0**30}
_SECONDS = {"": 1.0, "s": 1.0, "ms": 1e-3, "us": 1e-6}
UNITS: dict[str, dict[str, float]] = {
    "params": _COUNTS,
    "non_embedding_params": _COUNTS,
    "bytes": _BYTES,
    "decode_latency": _SECONDS,
    "memory": _BYTES,
}
_MOST = 2.0**53
_AMOUNT = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(%|[a-zA-Z]*)\s*")

AmountText = int | float | str


@dataclass(frozen=True)
class Amount:
    """value: in parameters, bytes or seconds; relative: a fraction of the start model's."""

    value: float
    relative: bool


def read_amount(key: str, text: int | float | str) -> Amount:
    """Parse 60%, 108M, 250MB or 20ms. Raises ValueError, with the accepted forms."""
    written = shown(text)
    found = _AMOUNT.fullmatch(written)
    number, unit = found.groups() if found else ("0", "")
    if 0 < float(number) <= 1e6 and unit == "%":
        return Amount(float(number) / 100, relative=True)
    factor = UNITS[key].get(unit.lower())
    if factor is None or not 0 < float(number) * factor <= _MOST:
        units = ", ".join(unit for unit in UNITS[key] if unit)
        raise ValueError(
            f"{written} is not a valid amount: write a percentage of the pruned model, such "
            f"as 60%, or a positive number, alone or with one of {units}"
        )
    return Amount(float(number) * factor, relative=False)


class TargetRecipe(Section):
    """How large the student may be; exactly one key. Percentages are of the model that is
    pruned."""

    params: AmountText | None = Field(None, description="All parameters: 60% or 108M.")
    non_embedding_params: AmountText | None = Field(
        None, description="Without the embeddings and an untied head: 60% or 80M."
    )
    bytes: AmountText | None = Field(
        None, description="Size of the weights in export.dtype: 60% or 250MB."
    )
    decode_latency: AmountText | None = Field(
        None, description="Seconds a token on this machine, one sequence: 60% or 20ms."
    )
    memory: AmountText | None = Field(
        None, description="Peak memory of loading and decoding on this machine: 60% or 1.5GB."
    )

    @model_validator(mode="after")
    def _one_key(self) -> TargetRecipe:
        given = [key for key in UNITS if getattr(self, key) is not None]
        if len(given) != 1:
            raise ValueError(f"a target has exactly one of {', '.join(UNITS)}")
        return self

    @field_validator(*UNITS)
    @classmethod
    def _is_an_amount(cls, text: AmountText | None, info: ValidationInfo) -> AmountText | None:
        if text is not None:
            read_amount(str(info.field_name), text)
        return text

    @property
    def key(self) -> str:
        return next(key for key in UNITS if getattr(self, key) is not None)

    @property
    def amount(self) -> Amount:
        return read_amount(self.key, getattr(self, self.key))

    @property
    def measured(self) -> bool:
        """Whether a shape's cost must be measured on this machine."""
        return self.key in ("decode_latency", "memory")


Importance = Literal["refit", "activations", "gradients"]
Aggregation = Literal["l2", "mean"]
DepthImportance = Literal["kl", "block_influence", "norm_ratio", "gradients"]


class VocabularyFile(Section):
    """The tokens to keep, listed in a file."""

    path: PathText = Field(
        description="The tokens to keep: one a line, as the tokenizer writes them (Ġhouse), or in "
        "a .json file a list of tokens or ids."
    )


class PruningMethod(Section):
    """How the parts of the model to keep are chosen."""

    importance: Importance = Field(
        "refit",
        description="For neurons, heads and channels. refit: the error that remains after the "
        "others were refit (activations, with refit: false); activations: norm of activations x "
        "norm of the weights that read them; gradients: Fisher information of the KL.",
    )
    aggregation: Aggregation = Field(
        "l2", description="How importance: activations aggregates over calibration rows."
    )
    depth_importance: DepthImportance = Field(
        "kl",
        description="For layers. kl: the KL of the output without each layer, one at a time; "
        "block_influence: 1 - cosine of the residual stream before and after; norm_ratio: norm "
        "after / norm before; gradients: Fisher information.",
    )

    @model_validator(mode="after")
    def _aggregation_needs_activations(self) -> Self:
        if self.aggregation != "l2" and self.importance != "activations":
            raise ValueError("aggregation does nothing without importance: activations")
        return self


class SearchRecipe(Section):
    """How the shape that meets a target is found."""

    axes: list[Annotated[str, OneOf(AXES)]] = Field(
        default=list(AXES),
        min_length=1,
        description="Dimensions that may be pruned, if the architecture has them.",
    )
    tolerance: PartialShare = Field(0.03, description="How far under the target a shape may be.")
    multiple_of: Width | None = Field(
        None,
        description="FFN and hidden sizes are multiples of this; null: 256 if it fits, else 128, "
        "64 or 32.",
    )
    tensor_parallel: Count = Field(
        1, description="GPUs among which heads and FFN must divide evenly."
    )
    candidates: SmallCount = Field(
        6, description="Shapes that are pruned, refit and measured; the best by each axis."
    )
    calibration_tokens: Tokens = Field(
        16384, description="Tokens each of them is refit on; the student's own are more."
    )
    heldout_tokens: Tokens = Field(
        4096, description="Training tokens that are held out to measure candidates."
    )
    trained: CountOrZero = Field(
        4, description="Best of them that are distilled for a short while; 0 or 1: none."
    )
    steps: Steps = Field(
        8,
        description="Optimizer steps of the first round; half of the shapes go on to the next, "
        "which has twice as many.",
    )

    @property
    def winner_steps(self) -> int:
        """Optimizer steps of the shape that is found, over all rounds."""
        alive, steps, total = self.trained, self.steps, 0
        while alive > 1:
            total, steps, alive = total + steps, 2 * steps, alive // 2
        return total

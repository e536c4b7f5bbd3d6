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
    """A target amount.

    value: number of parameters, bytes, or seconds; if relative, a fraction of the start model's.
    """

    value: float
    relative: bool


def read_amount(key: str, text: int | float | str) -> Amount:
    """Parse an amount such as 60%, 108M, 250MB, or 20ms. Raises ValueError if it is not valid."""
    written = shown(text)
    found = _AMOUNT.fullmatch(written)
    number, unit = found.groups() if found else ("0", "")
    if 0 < float(number) <= 1e6 and unit == "%":
        return Amount(float(number) / 100, relative=True)
    factor = UNITS[key].get(unit.lower())
    if factor is None or not 0 < float(number) * factor <= _MOST:
        units = ", ".join(unit for unit in UNITS[key] if unit)
        raise ValueError(
            f"{written} is not a valid amount: write a percentage of the model to prune, such as "
            f"60%, or a positive number, optionally followed by one of {units}"
        )
    return Amount(float(number) * factor, relative=False)


class TargetRecipe(Section):
    """Maximum size or cost of the student; set exactly one key. Percentages are relative to the
    model that is pruned."""

    params: AmountText | None = Field(
        None, description="Number of parameters, such as 60% or 108M."
    )
    non_embedding_params: AmountText | None = Field(
        None,
        description="Number of parameters without the embeddings and an untied head, such as 60% "
        "or 80M.",
    )
    bytes: AmountText | None = Field(
        None, description="Size of the weights in export.dtype, such as 60% or 250MB."
    )
    decode_latency: AmountText | None = Field(
        None,
        description="Time per token when decoding one sequence on this machine, such as 60% or "
        "20ms.",
    )
    memory: AmountText | None = Field(
        None,
        description="Peak memory while loading and decoding on this machine, such as 60% or 1.5GB.",
    )

    @model_validator(mode="after")
    def _one_key(self) -> TargetRecipe:
        given = [key for key in UNITS if getattr(self, key) is not None]
        if len(given) != 1:
            raise ValueError(f"a target must have exactly one of {', '.join(UNITS)}")
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
        description="File with one token per line, in the tokenizer's notation (Ġhouse), or a "
        ".json file with a list of tokens or ids."
    )


class PruningMethod(Section):
    """How to choose the parts of the model to keep."""

    importance: Importance = Field(
        "refit",
        description="How neurons, heads, and channels are ranked. refit: by the error that remains "
        "after refitting the others (like activations if refit: false); activations: by the norm "
        "of activations times the norm of the weights that read them; gradients: by the Fisher "
        "information of the KL.",
    )
    aggregation: Aggregation = Field(
        "l2",
        description="How `importance: activations` aggregates activations over calibration rows.",
    )
    depth_importance: DepthImportance = Field(
        "kl",
        description="How layers are ranked. kl: by the output's KL without the layer; "
        "block_influence: by 1 - cosine similarity of the residual stream before and after the "
        "layer; norm_ratio: by the ratio of the stream's norm after to before; gradients: by "
        "Fisher information.",
    )

    @model_validator(mode="after")
    def _aggregation_needs_activations(self) -> Self:
        if self.aggregation != "l2" and self.importance != "activations":
            raise ValueError("aggregation has no effect without importance: activations")
        return self


class SearchRecipe(Section):
    """How to find the best shape that meets a target."""

    axes: list[Annotated[str, OneOf(AXES)]] = Field(
        default=list(AXES),
        min_length=1,
        description="Dimensions that can be pruned, if the architecture has them.",
    )
    tolerance: PartialShare = Field(
        0.03, description="How far below the target a shape can be, as a fraction of the target."
    )
    multiple_of: Width | None = Field(
        None,
        description="FFN and hidden sizes are multiples of this; null: 256 if possible, else 128, "
        "64, or 32.",
    )
    tensor_parallel: Count = Field(
        1, description="Number of GPUs among which heads and FFN must divide evenly."
    )
    candidates: SmallCount = Field(
        6,
        description="Number of shapes to prune, refit, and measure: those whose cuts cost least "
        "when measured axis by axis.",
    )
    calibration_tokens: Tokens = Field(
        16384,
        description="Number of tokens to refit each candidate on; the chosen shape is refit again "
        "on student.calibration_tokens.",
    )
    heldout_tokens: Tokens = Field(
        4096, description="Number of training tokens held out to measure candidates."
    )
    trained: CountOrZero = Field(
        4,
        description="Number of best candidates to distill briefly and compare again; 0 or 1: none.",
    )
    steps: Steps = Field(
        8,
        description="Optimizer steps of the first round of training; the better half of the "
        "shapes goes on to the next round, which has twice as many.",
    )

    @property
    def winner_steps(self) -> int:
        """Optimizer steps of the shape that is chosen, over all rounds."""
        alive, steps, total = self.trained, self.steps, 0
        while alive > 1:
            total, steps, alive = total + steps, 2 * steps, alive // 2
        return total

"""What a student matches: the terms of the loss."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from stillhouse.objectives.objective_names import (
    PARAMETERS,
    Distance,
    LayerMapping,
    Relation,
    ScheduleShape,
)
from stillhouse.section import OneOf, Section


class ScheduleRecipe(Section):
    """A factor of a term's weight that moves as training goes on."""

    start: float = Field(ge=0, strict=False, description="The factor up to `begin`.")
    end: float = Field(ge=0, strict=False, description="The factor from `finish` on.")
    begin: float = Field(0.0, ge=0, le=1, strict=False, description="Share of all steps.")
    finish: float = Field(1.0, ge=0, le=1, strict=False, description="Share of all steps.")
    shape: ScheduleShape = "linear"

    @model_validator(mode="after")
    def _goes_forward(self) -> ScheduleRecipe:
        if self.begin >= self.finish:
            raise ValueError(f"begin ({self.begin:g}) must come before finish ({self.finish:g})")
        return self


class Weighted(Section):
    weight: float = Field(1.0, ge=0, strict=False)
    schedule: ScheduleRecipe | None = Field(None, description="Moves the weight; null: it stays.")


class LayerTerm(Weighted):
    """Which blocks of the student are compared with which of the teacher; 1 is the first."""

    layers: LayerMapping = Field(
        "uniform",
        description="uniform: the student's blocks spread over the teacher's depth; "
        "last: the last `count` blocks of both.",
    )
    count: int | None = Field(None, gt=0, description="Blocks to pair; null: all of the student's.")
    pairs: list[Annotated[tuple[int, int], Field(strict=False)]] | None = Field(
        None, min_length=1, description="[student block, teacher block] pairs, in place of layers."
    )


class LogitsTerm(Weighted):
    """A divergence between the next-token distributions, or cross-entropy with the data."""

    kind: Literal["logits"] = "logits"
    divergence: Annotated[str, OneOf(PARAMETERS)] = "forward_kl"
    temperature: float = Field(
        1.0, gt=0, strict=False, description="Divides both models' logits; cross-entropy keeps 1."
    )
    t_squared: bool = Field(
        True, description="Multiply by the temperature squared, so that gradients keep their size."
    )
    alpha: float | None = Field(None, ge=0, strict=False, description="skew_*, alpha_beta.")
    beta: float | None = Field(None, ge=0, strict=False, description="jsd, alpha_beta.")
    mu: float | None = Field(None, ge=0, strict=False, description="adaptive_kl.")
    layers: list[int] | None = Field(
        None,
        min_length=1,
        description="Student blocks whose output goes through the final norm and the head, 1 the "
        "first; null: the model's own output.",
    )

    @model_validator(mode="after")
    def _cross_entropy_keeps_temperature_one(self) -> LogitsTerm:
        if self.divergence == "cross_entropy" and self.temperature != 1.0:
            raise ValueError("cross_entropy has no temperature: remove the key")
        return self


class HiddenStatesTerm(LayerTerm):
    """Distance between blocks' outputs, through a learned map where the widths differ."""

    kind: Literal["hidden_states"]
    distance: Distance = "mse"
    embeddings: bool = Field(False, description="Pair the embeddings of both models too.")


class AttentionRelationsTerm(LayerTerm):
    """KL between attention relations Q-Q, K-K and V-V (MiniLMv2)."""

    kind: Literal["attention_relations"]
    heads: int = Field(gt=0, description="Relation heads; divides both models' q, k, v widths.")
    relations: list[Relation] = Field(default=["query", "key", "value"], min_length=1)
    layers: LayerMapping = "last"
    count: int | None = Field(1, gt=0, description="Blocks to pair; null: all of the student's.")


def _logits_by_default(terms: Any) -> Any:
    if not isinstance(terms, list):
        return terms
    return [{"kind": "logits", **term} if isinstance(term, dict) else term for term in terms]


ObjectiveTerm = Annotated[
    LogitsTerm | HiddenStatesTerm | AttentionRelationsTerm, Field(discriminator="kind")
]


class ObjectiveRecipe(Section):
    terms: Annotated[list[ObjectiveTerm], BeforeValidator(_logits_by_default)] = Field(
        default=[LogitsTerm()], min_length=1, description="Their weighted sum is the loss."
    )

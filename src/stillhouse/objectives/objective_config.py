"""Recipe sections of the objective: the terms of the loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from stillhouse.field_types import (
    CountOrZero,
    Parameter,
    ShareOrZero,
    SmallCount,
    Temperature,
    Weight,
)
from stillhouse.objectives.objective_names import (
    PARAMETERS,
    ChunkDistance,
    Distance,
    LayerMapping,
    Relation,
    ScheduleShape,
)
from stillhouse.section import OneOf, Section


class ScheduleRecipe(Section):
    """A factor on a term's weight that changes during training."""

    start: Weight = Field(description="The factor until `begin`.")
    end: Weight = Field(description="The factor from `finish` on.")
    begin: ShareOrZero = Field(
        0.0, description="When the change starts, as a fraction of all steps."
    )
    finish: ShareOrZero = Field(
        1.0, description="When the change ends, as a fraction of all steps."
    )
    shape: ScheduleShape = "linear"

    @model_validator(mode="after")
    def _goes_forward(self) -> ScheduleRecipe:
        if self.begin >= self.finish:
            raise ValueError(f"begin ({self.begin:g}) must come before finish ({self.finish:g})")
        return self


class Weighted(Section):
    weight: Weight = 1.0
    schedule: ScheduleRecipe | None = Field(
        None, description="Changes the weight during training; null: constant."
    )

    @property
    def largest_weight(self) -> float:
        """The largest weight at any time during training."""
        schedule = self.schedule
        return self.weight * (1.0 if schedule is None else max(schedule.start, schedule.end))


class LayerTerm(Weighted):
    """Which student block is compared with which teacher block, counted from 1."""

    layers: LayerMapping = Field(
        "uniform",
        description="uniform: spread the student's blocks over the teacher's depth; "
        "last: pair the last `count` blocks of both models.",
    )
    count: SmallCount | None = Field(
        None, description="Number of blocks to pair; null: all of the student's."
    )
    pairs: list[Annotated[tuple[CountOrZero, CountOrZero], Field(strict=False)]] | None = Field(
        None, min_length=1, description="[student block, teacher block] pairs; replaces `layers`."
    )


class LogitsTerm(Weighted):
    """A divergence between the next-token distributions, or cross-entropy with the data."""

    kind: Literal["logits"] = "logits"
    divergence: Annotated[str, OneOf(PARAMETERS)] = "forward_kl"
    temperature: Temperature = Field(
        1.0, description="Divides both models' logits; always 1 for cross_entropy."
    )
    t_squared: bool = Field(
        True, description="Multiply by the temperature squared, so that gradients keep their size."
    )
    alpha: Parameter | None = Field(
        None, description="Parameter of skew_forward_kl, skew_reverse_kl, and alpha_beta."
    )
    beta: Parameter | None = Field(
        None, description="Parameter of jsd, normalized_jsd, and alpha_beta."
    )
    mu: Parameter | None = Field(None, description="Parameter of adaptive_kl.")
    layers: list[SmallCount] | None = Field(
        None,
        min_length=1,
        description="Student blocks, counted from 1, whose output goes through the final norm and "
        "the LM head; null: the model's own output.",
    )

    @property
    def parameters(self) -> dict[str, float]:
        """The divergence's parameters, defaults filled in."""
        known = PARAMETERS[self.divergence]
        given = {name: getattr(self, name) for name in known}
        return {name: known[name] if given[name] is None else given[name] for name in known}

    @model_validator(mode="after")
    def _parameters_are_the_divergences(self) -> LogitsTerm:
        name, parameters = self.divergence, self.parameters
        if name == "cross_entropy" and self.temperature != 1.0:
            raise ValueError("cross_entropy has no temperature: remove the key")
        for key in ("alpha", "beta", "mu"):
            if getattr(self, key) is not None and key not in parameters:
                accepted = ", ".join(parameters) or "no parameters"
                raise ValueError(f"{name} has no {key}: it accepts {accepted}")
        if name == "alpha_beta":
            if not any(parameters.values()):
                raise ValueError("alpha_beta is not defined when alpha and beta are both 0")
            return self
        for key, value in parameters.items():
            if value > 1 or 1 - 1e-6 < value < 1:
                raise ValueError(
                    f"{key} of {name} is {value}: it must be between 0 and 0.999999, or 1"
                )
            if (value == 1 and name.startswith("skew")) or (value in (0, 1) and name == "jsd"):
                raise ValueError(f"{name} with {key} {value:g} is 0 for every student")
        return self


class HiddenStatesTerm(LayerTerm):
    """Distance between hidden states after paired blocks, through a learned projection if the
    widths differ."""

    kind: Literal["hidden_states"]
    distance: Distance = "mse"
    embeddings: bool = Field(False, description="Also pair both models' embeddings.")


class AttentionRelationsTerm(LayerTerm):
    """KL between attention relations Q-Q, K-K, and V-V (MiniLMv2)."""

    kind: Literal["attention_relations"]
    heads: SmallCount = Field(
        description="Number of relation heads; must divide both models' q, k, and v widths."
    )
    relations: list[Relation] = Field(default=["query", "key", "value"], min_length=1)
    layers: LayerMapping = "last"
    count: SmallCount | None = Field(
        1, description="Number of blocks to pair; null: all of the student's."
    )


class ChunksTerm(Weighted):
    """Distance between the teacher's and the student's likelihoods of pieces of text that they
    tokenize differently; for teachers with a different tokenizer."""

    kind: Literal["chunks"]
    distance: ChunkDistance = Field(
        "binary",
        description="binary: KL of `this text` versus `any other`; "
        "squared: squared difference of log-likelihoods.",
    )


def _logits_by_default(terms: Any) -> Any:
    if not isinstance(terms, list):
        return terms
    return [{"kind": "logits", **term} if isinstance(term, dict) else term for term in terms]


ObjectiveTerm = Annotated[
    LogitsTerm | HiddenStatesTerm | AttentionRelationsTerm | ChunksTerm,
    Field(discriminator="kind"),
]


def require_different(terms: Sequence[ObjectiveTerm]) -> None:
    """Raise ValueError if two terms on the same logits differ in nothing but their weights."""
    seen = set()
    for term in terms:
        if isinstance(term, LogitsTerm):
            parameters = tuple(term.parameters.values())
            for layer in term.layers or [0]:  # 0: the output
                key = (term.divergence, term.temperature, parameters, layer)
                if key in seen:
                    raise ValueError(
                        f"two {term.divergence} terms are the same: merge them and add their "
                        "weights"
                    )
                seen.add(key)


class ObjectiveRecipe(Section):
    terms: Annotated[list[ObjectiveTerm], BeforeValidator(_logits_by_default)] = Field(
        default=[LogitsTerm()], min_length=1, description="The loss is their weighted sum."
    )

    @model_validator(mode="after")
    def _something_is_learned(self) -> ObjectiveRecipe:
        require_different(self.terms)
        if not any(term.largest_weight for term in self.terms):
            raise ValueError(
                "every term has weight 0, so nothing would be learned: raise at least one weight"
            )
        return self

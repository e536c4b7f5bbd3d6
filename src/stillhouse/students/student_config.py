"""Recipe sections for the initial student."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from stillhouse.field_types import FiniteNumber, PathText, SmallCount, Tokens, WholeNumber, Width
from stillhouse.pruning.pruning_config import (
    PruningMethod,
    SearchRecipe,
    TargetRecipe,
    VocabularyFile,
)
from stillhouse.pruning.sizes import AXES, HiddenMethod
from stillhouse.section import Section


class PretrainedStudent(Section):
    """An existing smaller model."""

    start: Literal["pretrained"]
    model: PathText = Field(description="As teacher.model.")
    revision: str | None = None
    trust_remote_code: bool = False


class RandomStudent(Section):
    """Random weights: distillation during pretraining."""

    start: Literal["random"]
    config: PathText | None = Field(
        None, description="Folder or Hub id whose config.json is the start; null: the teacher's."
    )
    tokenizer: PathText | None = Field(
        None,
        description="Folder or Hub id whose tokenizer the student has; null: the teacher's.",
    )
    overrides: dict[str, WholeNumber | FiniteNumber | bool | str] = Field(
        default={}, description="Config values to change, e.g. hidden_size: 256."
    )


class PrunedSizes(Section):
    """The sizes to keep; a size that is left out is not changed."""

    ffn_size: Width | None = Field(
        None, description="FFN neurons to keep in every layer (of every expert)."
    )
    layers: SmallCount | None = Field(None, description="Layers to keep.")
    heads: SmallCount | None = Field(
        None, description="Query heads to keep, equally many in every key-value group."
    )
    kv_heads: SmallCount | None = Field(None, description="Key-value groups to keep.")
    hidden_size: Width | None = Field(None, description="Width of the residual stream to keep.")
    hidden_method: HiddenMethod = Field(
        "channels",
        description="channels: the channels that matter most; rotation: the principal directions, "
        "which unties the head from the embeddings.",
    )
    experts: SmallCount | None = Field(None, description="Experts to keep in every layer.")
    target: TargetRecipe | None = Field(
        None, description="Search for the best shape of a size, in place of explicit sizes."
    )

    @property
    def sizes(self) -> dict[str, Any]:
        """The sizes that are set, by their names in `AXES`."""
        found = {axis: getattr(self, axis) for axis in AXES}
        return {axis: size for axis, size in found.items() if size is not None}

    @model_validator(mode="after")
    def _sizes_or_a_target(self) -> Self:
        if self.target is not None and self.sizes:
            raise ValueError(f"give a target or sizes, not both: remove {', '.join(self.sizes)}")
        return self

    @model_validator(mode="after")
    def _method_needs_a_size(self) -> Self:
        if self.hidden_size is None and self.hidden_method != "channels":
            raise ValueError("hidden_method does nothing without hidden_size: set both, or neither")
        return self


class PrunedStudent(PrunedSizes, PruningMethod):
    """The teacher, or another model with its vocabulary, made smaller on the training text."""

    renamed: ClassVar[Mapping[str, str]] = {"reconstruct": "refit"}

    start: Literal["pruned"]
    model: PathText | None = Field(
        None, description="What is pruned, as teacher.model; null: the teacher."
    )
    vocabulary: Width | Literal["data"] | VocabularyFile | None = Field(
        None,
        description="Tokens to keep, the most frequent in the training text and in what the "
        "teacher expects there; data: all that the text has; or those of a file. The tokenizer is "
        "rewritten, and the teacher answers with these alone.",
    )
    removed_tokens: Literal["renormalize", "fold"] = Field(
        "renormalize",
        description="Where the teacher's probability of removed tokens goes. renormalize: to all "
        "kept tokens, in proportion; fold: to the first kept token of each, by the whole teacher.",
    )
    refit: bool = Field(True, description="Refit the remaining weights by least squares.")
    calibration_tokens: Tokens = Field(
        49152, description="Tokens for deciding what to remove and refitting what remains."
    )
    local_distillation: Tokens | None = Field(
        None,
        description="Tokens on which each block is trained, right after its cut, to reproduce the "
        "original block; null: none.",
    )
    search: SearchRecipe = Field(
        SearchRecipe(), description="How the shape that meets a target is found."
    )


StudentRecipe = Annotated[
    PretrainedStudent | RandomStudent | PrunedStudent, Field(discriminator="start")
]

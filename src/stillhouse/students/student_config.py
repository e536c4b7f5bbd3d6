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
    model: PathText = Field(description="Model to start from, in the same forms as teacher.model.")
    revision: str | None = None
    trust_remote_code: bool = False


class RandomStudent(Section):
    """Random weights, for distillation during pretraining."""

    start: Literal["random"]
    config: PathText | None = Field(
        None, description="Folder or Hub id with the config.json to use; null: the teacher's."
    )
    tokenizer: PathText | None = Field(
        None,
        description="Folder or Hub id with the tokenizer to use; null: the teacher's.",
    )
    overrides: dict[str, WholeNumber | FiniteNumber | bool | str] = Field(
        default={}, description="Values in config.json to change, e.g. hidden_size: 256."
    )


class PrunedSizes(Section):
    """The sizes to keep. Sizes that are not set stay unchanged."""

    ffn_size: Width | None = Field(
        None, description="FFN neurons to keep in every layer (or in every expert)."
    )
    layers: SmallCount | None = Field(None, description="Layers to keep.")
    heads: SmallCount | None = Field(
        None, description="Query heads to keep, the same number in every key-value group."
    )
    kv_heads: SmallCount | None = Field(None, description="Key-value groups to keep.")
    hidden_size: Width | None = Field(None, description="Width of the residual stream to keep.")
    hidden_method: HiddenMethod = Field(
        "channels",
        description="How hidden_size is pruned. channels: keep the most important channels; "
        "rotation: keep the principal directions, which unties the head from the embeddings.",
    )
    experts: SmallCount | None = Field(None, description="Experts to keep in every layer.")
    target: TargetRecipe | None = Field(
        None, description="Target for which the best shape is searched, instead of explicit sizes."
    )

    @property
    def sizes(self) -> dict[str, Any]:
        """The sizes that are set, by their names in `AXES`."""
        found = {axis: getattr(self, axis) for axis in AXES}
        return {axis: size for axis, size in found.items() if size is not None}

    @model_validator(mode="after")
    def _keys_agree(self) -> Self:
        if self.target is not None and self.sizes:
            raise ValueError(f"set a target or sizes, not both: remove {', '.join(self.sizes)}")
        if self.hidden_size is None and self.hidden_method != "channels":
            raise ValueError("hidden_method does nothing without hidden_size: set both, or neither")
        return self


class PrunedStudent(PrunedSizes, PruningMethod):
    """The teacher, or a different model with its vocabulary, pruned on the training text."""

    renamed: ClassVar[Mapping[str, str]] = {"reconstruct": "refit"}

    start: Literal["pruned"]
    model: PathText | None = Field(
        None,
        description="Model to prune, in the same forms as teacher.model; null: the teacher.",
    )
    vocabulary: Width | Literal["data"] | VocabularyFile | None = Field(
        None,
        description="Number of tokens to keep, chosen by frequency in the training text and in the "
        "teacher's predictions for it; data: keep all tokens in the text; or a file with the "
        "tokens. The tokenizer is rewritten, and the teacher predicts only these tokens.",
    )
    removed_tokens: Literal["renormalize", "fold"] = Field(
        "renormalize",
        description="Where the teacher's probability of a removed token goes. renormalize: to all "
        "kept tokens, in proportion; fold: to the first of the kept tokens that encode the removed "
        "one, which needs the unpruned teacher.",
    )
    refit: bool = Field(True, description="Refit the remaining weights by least squares.")
    calibration_tokens: Tokens = Field(
        49152, description="Training tokens for choosing what to remove and for refitting."
    )
    local_distillation: Tokens | None = Field(
        None,
        description="Tokens on which each block is trained, right after it is pruned, to reproduce "
        "the original block; null: no such training.",
    )
    search: SearchRecipe = Field(
        SearchRecipe(), description="How to search for the shape that meets a target."
    )


StudentRecipe = Annotated[
    PretrainedStudent | RandomStudent | PrunedStudent, Field(discriminator="start")
]

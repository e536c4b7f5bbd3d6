"""Prompts: from a file, from templates, or written by the teacher."""

from __future__ import annotations

from collections.abc import Mapping
from string import Formatter
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from stillhouse.data.data_files import FileFormat
from stillhouse.field_types import (
    AnswerTokens,
    CountOrZero,
    PathText,
    SamplingTemperature,
    Similarity,
    SmallCount,
    Tokens,
)
from stillhouse.section import Section

PromptFormat = FileFormat | Literal["auto"]


class ExampleRecipe(Section):
    prompt: str
    answer: str


class CombineRecipe(Section):
    """Every template with every combination of the values of its {names}."""

    templates: list[str] = Field(min_length=1, description='E.g. "Explain {topic} to {persona}."')
    values: dict[str, list[str]] = Field(
        default={}, description="E.g. topic: [tides, rainbows]; persona: [a child, an engineer]."
    )

    @model_validator(mode="after")
    def _names_have_values(self) -> CombineRecipe:
        for template in self.templates:
            try:
                found = [name for _, name, _, _ in Formatter().parse(template) if name is not None]
            except ValueError as error:
                raise ValueError(f"the template {template!r} cannot be read: {error}") from None
            lacking = [name for name in found if not self.values.get(name)]
            if lacking:
                raise ValueError(f"the template {template!r} has {{{lacking[0]}}} and no values")
        return self


class WriteRecipe(Section):
    """The teacher writes the prompts; each request for some of them uses one combination."""

    renamed: ClassVar[Mapping[str, str]] = {"each": "per_request", "similar": "max_similarity"}

    count: Annotated[int, Field(gt=0, le=10**8)] = Field(description="Number of different prompts.")
    per_request: SmallCount = Field(10, description="Prompts per request.")
    examples: CountOrZero = Field(
        3, description="Examples from `path` in a request, different ones each time."
    )
    max_similarity: Similarity = Field(
        0.6,
        description="Drop prompts this similar (Jaccard) to an earlier one, or to one in `path`.",
    )
    temperature: SamplingTemperature = 1.0
    max_tokens: AnswerTokens = Field(1024, description="Limit for all prompts of one request.")


class PromptsRecipe(Section):
    """From a file, or combined from templates, or written by the teacher."""

    path: PathText | None = Field(
        None,
        description="Text, JSONL, JSON, CSV, TSV or Parquet, also compressed; logs of chat "
        "completions too. With `write`: examples of the prompts to write.",
    )
    combine: CombineRecipe | None = None
    write: WriteRecipe | None = None
    format: PromptFormat = Field("auto", description="auto: by the file's extension.")
    key: str = Field("prompt", description="The column or key of the prompt.")
    limit: Tokens | None = Field(None, description="Use at most this many prompts.")
    samples: SmallCount = Field(1, description="Answers to each prompt.")
    system: str | None = Field(None, description="For prompts without a system prompt.")
    examples: list[ExampleRecipe] = Field(
        default=[], description="Few-shot examples before every prompt."
    )
    student_sees: Literal["prompt", "system", "all"] = Field(
        "system",
        description="What the student sees besides the prompt: nothing, the system prompt, or "
        "the examples too.",
    )

    @model_validator(mode="after")
    def _come_from_one_place(self) -> PromptsRecipe:
        if self.write is None and (self.path is None) == (self.combine is None):
            raise ValueError("give either path or combine")
        if self.write is not None and self.combine is None:
            raise ValueError("write needs combine, which describes the prompts to write")
        return self

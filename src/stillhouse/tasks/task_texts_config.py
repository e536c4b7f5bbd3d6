"""Recipe sections that all tasks share: the texts, and the prompt for each text."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, Field, model_validator

from stillhouse.field_types import PartialShare, PathText, Tokens
from stillhouse.section import Section


def _with_a_place(prompt: str) -> str:
    if "{text}" not in prompt:
        raise ValueError("the prompt has no {text}, so the teacher would not see the text")
    return prompt


TextPrompt = Annotated[str, AfterValidator(_with_a_place)]
"""The user turn with a text, in place of {text}."""


class TextFile(Section):
    """Texts, one per row."""

    path: PathText = Field(
        description="A file, a folder, or a glob of text (one per line), JSONL, JSON, CSV, TSV, or "
        "Parquet; files may be compressed."
    )
    text: str = Field("text", description="The column or key that contains the text.")
    label: str | None = Field(
        None, description="The column or key that contains the reference label, if any."
    )
    limit: Tokens | None = Field(None, description="Use only the first rows, at most this many.")
    sample: Tokens | None = Field(
        None, description="Use a random sample of at most this many rows (for sorted files)."
    )

    @model_validator(mode="after")
    def _one_of_both(self) -> TextFile:
        if self.limit is not None and self.sample is not None:
            raise ValueError(
                "limit uses the first rows and sample uses random rows: set only one of them"
            )
        return self


class TaskTextsRecipe(Section):
    """The texts of a task of any kind."""

    texts: list[TextFile] = Field(
        min_length=1,
        description="Training texts. Reference labels or answers, if any (`label`; for an "
        "extraction, a column of text or JSON), are used for evaluation and to train the "
        "fine-tuned baseline; the student learns only from the teacher.",
    )
    test: list[TextFile] = Field(
        default=[], description="Test texts; if empty, a share of `texts` is split off."
    )
    test_share: PartialShare = Field(
        0.2, description="Share of `texts` to split off for testing if `test` is empty."
    )

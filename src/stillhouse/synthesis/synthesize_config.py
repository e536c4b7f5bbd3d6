"""The section `synthesize`: prompts, the teacher that answers them, and filters."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from stillhouse.field_types import PathText
from stillhouse.generation.generation_config import (
    BudgetRecipe,
    SamplingRecipe,
    TextTeacher,
    check_text_teacher,
)
from stillhouse.section import Section
from stillhouse.synthesis.filters_config import FiltersRecipe
from stillhouse.synthesis.prompts_config import PromptsRecipe


class SynthesizeRecipe(Section):
    """Training text from a teacher: chats as JSONL, which `data` reads."""

    teacher: TextTeacher
    prompts: PromptsRecipe
    sampling: SamplingRecipe = SamplingRecipe()
    reasoning: Literal["strip", "keep"] = Field(
        "strip", description="The teacher's reasoning in <think> before its answer."
    )
    filters: FiltersRecipe = FiltersRecipe()
    budget: BudgetRecipe = BudgetRecipe()
    journal: PathText | None = Field(
        None,
        description="SQLite file with every answer that was paid for; null: answers.sqlite beside "
        "the run folder, shared by all runs there.",
    )
    out: PathText = Field(
        "synthetic.jsonl",
        description="The result; a relative path starts from the recipe's folder.",
    )

    @model_validator(mode="after")
    def _keys_fit_the_teacher(self) -> SynthesizeRecipe:
        samples = self.prompts.samples
        check_text_teacher(self.teacher.api, self.sampling, self.budget, samples)
        if self.filters.best_of is not None and samples < 2:
            raise ValueError("filters.best_of chooses among several answers: set prompts.samples")
        return self

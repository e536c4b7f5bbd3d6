"""The section `synthesize`: prompts, the teacher that answers them, and what is kept."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from stillhouse.generation.generation_config import (
    BudgetRecipe,
    SamplingRecipe,
    TextTeacher,
    check_budget,
    check_samples,
    check_sampling,
)
from stillhouse.section import Section
from stillhouse.synthesis.filters_config import FiltersRecipe
from stillhouse.synthesis.prompts_config import PromptsRecipe


class SynthesizeRecipe(Section):
    """Text from a teacher: a chat JSONL that `data` reads."""

    teacher: TextTeacher
    prompts: PromptsRecipe
    sampling: SamplingRecipe = SamplingRecipe()
    reasoning: Literal["strip", "keep"] = Field(
        "strip", description="What the teacher thinks in <think> before it answers."
    )
    filters: FiltersRecipe = FiltersRecipe()
    budget: BudgetRecipe = BudgetRecipe()
    journal: str | None = Field(
        None,
        description="SQLite file with every answer ever paid for; null: answers.sqlite beside "
        "the run folder, shared by all runs there.",
    )
    out: str = Field("synthetic.jsonl", description="The result; starts at the recipe's folder.")

    @model_validator(mode="after")
    def _keys_fit_the_teacher(self) -> SynthesizeRecipe:
        api = self.teacher.api
        check_budget(api, self.budget)
        check_sampling(api, self.sampling)
        check_samples(self.prompts.samples, self.sampling)
        if self.filters.best_of is not None and self.prompts.samples < 2:
            raise ValueError("filters.best_of chooses among several answers: set prompts.samples")
        return self

"""What of a teacher's answers is kept: choices among several, and filters."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from stillhouse.generation.generation_config import (
    BudgetRecipe,
    TextTeacher,
    VerdictSampling,
    check_text_teacher,
)
from stillhouse.section import Section
from stillhouse.synthesis.prompts_config import PromptFormat


class EvaluationTexts(Section):
    path: str = Field(description="Prompts that training must not see; as prompts.path.")
    format: PromptFormat = "auto"
    key: str = "prompt"
    ngram: int = Field(13, ge=2, description="Words in a row that a text may not share with them.")


class MajorityChoice(Section):
    """Of the answers to a prompt, those that say what most of them say (self-consistency)."""

    kind: Literal["majority"]
    pattern: str | None = Field(
        None,
        description="A regular expression; its last match in an answer is what is compared, or "
        "the first group of it. null: the whole answer.",
    )
    least: float = Field(
        0.0, ge=0, le=1, strict=False, description="Share of the answers that must agree."
    )
    keep: Literal["one", "all"] = Field(
        "one", description="Of those that agree: the first, or all."
    )


class LikelihoodChoice(Section):
    """The answer with the highest mean log-probability of its tokens under the teacher."""

    kind: Literal["likelihood"]


class JudgeChoice(Section):
    """The answer that a model likes best."""

    kind: Literal["judge"]
    teacher: TextTeacher = Field(description="The judge, as synthesize.teacher.")
    criteria: str = Field(
        "It is correct and complete, does what was asked, and is clearly written.",
        description="What a good answer is.",
    )
    compare: Literal["scores", "pairs"] = Field(
        "scores",
        description="scores: each answer gets 1 to 10; pairs: each pair is compared twice, in "
        "either order, n(n - 1) requests for n answers.",
    )
    sampling: VerdictSampling = VerdictSampling()
    budget: BudgetRecipe = Field(BudgetRecipe(), description="Of the judge alone.")

    @model_validator(mode="after")
    def _keys_fit_the_judge(self) -> JudgeChoice:
        check_text_teacher(self.teacher.api, self.sampling, self.budget)
        return self


Choice = Annotated[
    MajorityChoice | LikelihoodChoice | JudgeChoice,
    Field(discriminator="kind"),
]


class FiltersRecipe(Section):
    """Empty answers are always dropped. dropped.jsonl has every dropped row and the reason."""

    truncated: bool = Field(True, description="Drop answers that were cut off.")
    min_characters: int | None = Field(None, ge=0)
    max_characters: int | None = Field(None, gt=0)
    refusals: bool = Field(True, description="Drop answers that begin like an English refusal.")
    require_pattern: str | None = Field(None, description="A regular expression to be found.")
    forbid_pattern: str | None = Field(None, description="A regular expression not to be found.")
    json_schema: str | None = Field(None, description="A file; answers must be JSON of its kind.")
    languages: list[str] | None = Field(
        None,
        min_length=1,
        description="ISO 639-1 codes, e.g. [en, de]; drop answers that are surely in none of "
        "them. Needs stillhouse[language].",
    )
    best_of: Choice | None = Field(
        None, description="Of several answers to a prompt (prompts.samples), keep the best."
    )
    exact_duplicates: bool = Field(True, description="Drop repeated pairs of prompt and answer.")
    near_duplicates: float | None = Field(
        None, gt=0, le=1, strict=False, description="Drop pairs this similar (Jaccard), e.g. 0.8."
    )
    decontaminate: EvaluationTexts | None = None

"""Which answers of a teacher are kept: a choice among several, and filters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from stillhouse.field_types import PathText, ShareOrZero, Similarity, Tokens, TokensOrZero
from stillhouse.generation.generation_config import (
    BudgetRecipe,
    TextTeacher,
    VerdictSampling,
    check_text_teacher,
)
from stillhouse.section import Section
from stillhouse.synthesis.prompts_config import PromptFormat


class EvaluationTexts(Section):
    path: PathText = Field(
        description="Prompts that must not be in the training text; see prompts.path."
    )
    format: PromptFormat = "auto"
    key: str = "prompt"
    ngram: Annotated[int, Field(ge=2, le=1000)] = Field(
        13, description="Drop rows that share this many consecutive words with one."
    )


class MajorityChoice(Section):
    """The answers to a prompt that agree with the majority (self-consistency)."""

    renamed: ClassVar[Mapping[str, str]] = {"least": "min_agreement"}

    kind: Literal["majority"]
    pattern: str | None = Field(
        None,
        description="A regular expression; its last match in an answer, or that match's first "
        "group, is compared. null: the complete answer.",
    )
    min_agreement: ShareOrZero = Field(0.0, description="Share of the answers that must agree.")
    keep: Literal["one", "all"] = Field(
        "one", description="Which of the answers that agree: the first, or all."
    )


class LikelihoodChoice(Section):
    """The answer with the highest mean log-probability of its tokens under the teacher."""

    kind: Literal["likelihood"]


class JudgeChoice(Section):
    """The answer that a model prefers."""

    kind: Literal["judge"]
    teacher: TextTeacher = Field(description="The judge, as synthesize.teacher.")
    criteria: str = Field(
        "It is correct and complete, does what was asked, and is clearly written.",
        description="What a good answer is.",
    )
    compare: Literal["scores", "pairs"] = Field(
        "scores",
        description="scores: each answer gets 1 to 10; pairs: each pair is compared twice, in "
        "both orders, n(n - 1) requests for n answers.",
    )
    sampling: VerdictSampling = VerdictSampling()
    budget: BudgetRecipe = Field(BudgetRecipe(), description="For the judge only.")

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
    min_characters: TokensOrZero | None = None
    max_characters: Tokens | None = None
    refusals: bool = Field(True, description="Drop answers that refuse to answer.")
    require_pattern: str | None = Field(None, description="A regular expression that must match.")
    forbid_pattern: str | None = Field(
        None, description="A regular expression that must not match."
    )
    json_schema: PathText | None = Field(
        None, description="A file; answers must be JSON that matches this schema."
    )
    languages: list[str] | None = Field(
        None,
        min_length=1,
        description="ISO 639-1 codes, e.g. [en, de]; drop answers that are clearly in none of "
        "them. Needs stillhouse[language].",
    )
    best_of: Choice | None = Field(
        None, description="Keep the best of several answers to a prompt (prompts.samples)."
    )
    exact_duplicates: bool = Field(True, description="Drop repeated pairs of prompt and answer.")
    near_duplicates: Similarity | None = Field(
        None, description="Drop pairs this similar (Jaccard), e.g. 0.8."
    )
    decontaminate: EvaluationTexts | None = None

    @model_validator(mode="after")
    def _some_length_is_kept(self) -> FiltersRecipe:
        least, most = self.min_characters or 0, self.max_characters
        if most is not None and least > most:
            raise ValueError(f"min_characters ({least:,}) is above max_characters ({most:,})")
        return self

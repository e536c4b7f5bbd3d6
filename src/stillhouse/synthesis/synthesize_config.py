"""The section `synthesize`: prompts, the teacher that answers them, and filters of its answers."""

from __future__ import annotations

import math
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
    ShareOrZero,
    Similarity,
    SmallCount,
    Tokens,
    TokensOrZero,
)
from stillhouse.generation.generation_config import (
    BudgetRecipe,
    SamplingRecipe,
    TextTeacher,
    VerdictSampling,
    check_text_teacher,
)
from stillhouse.section import Section

PromptFormat = FileFormat | Literal["auto"]
MOST_COMBINATIONS = 10**6
"""They are shuffled in memory."""


def names_in(template: str) -> list[str]:
    """The different {names} of a template, in order. Raises ValueError if it is malformed."""
    found = [name for _, name, _, _ in Formatter().parse(template) if name is not None]
    return list(dict.fromkeys(found))


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
    def _can_be_combined(self) -> CombineRecipe:
        total = 0
        for template in self.templates:
            try:
                names = names_in(template)
                lacking = [name for name in names if not self.values.get(name)]
                if not lacking:
                    template.format(**{name: self.values[name][0] for name in names})
            except (ValueError, LookupError, AttributeError) as error:
                raise ValueError(
                    f"the template {template!r} cannot be read: {error}; write {{name}} for a "
                    "value, and {{ and }} for braces"
                ) from None
            if lacking:
                raise ValueError(f"the template {template!r} has {{{lacking[0]}}} and no values")
            total += math.prod(len(self.values[name]) for name in names)
        if total > MOST_COMBINATIONS:
            raise ValueError(
                f"the templates have {total:,} combinations, and {MOST_COMBINATIONS:,} are the "
                "most: give fewer values, or templates with fewer names"
            )
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


# --- filters ------------------------------------------------------------------------------------


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

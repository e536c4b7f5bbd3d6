"""The section `synthesize`: prompts, the teacher that answers them, and filters for its answers."""

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
"""A limit, because combinations are shuffled in memory."""


def names_in(template: str) -> list[str]:
    """The distinct {names} in a template, in order. Raises ValueError if it is malformed."""
    found = [name for _, name, _, _ in Formatter().parse(template) if name is not None]
    return list(dict.fromkeys(found))


class ExampleRecipe(Section):
    prompt: str
    answer: str


class CombineRecipe(Section):
    """Every template with every combination of values for its {names}."""

    templates: list[str] = Field(
        min_length=1, description='Templates, e.g. "Explain {topic} to {persona}."'
    )
    values: dict[str, list[str]] = Field(
        default={},
        description="Values for the {names}, e.g. topic: [tides, rainbows]; persona: [a child, an "
        "engineer].",
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
                    f"the template {template!r} cannot be parsed: {error}; write {{name}} for a "
                    "value, and {{ and }} for literal braces"
                ) from None
            if lacking:
                raise ValueError(
                    f"the template {template!r} uses {{{lacking[0]}}}, which has no values"
                )
            total += math.prod(len(self.values[name]) for name in names)
        if total > MOST_COMBINATIONS:
            raise ValueError(
                f"the templates have {total:,} combinations, but at most {MOST_COMBINATIONS:,} are "
                "possible: use fewer values, or templates with fewer names"
            )
        return self


class WriteRecipe(Section):
    """Let the teacher write the prompts; each request for prompts uses one combination."""

    renamed: ClassVar[Mapping[str, str]] = {"each": "per_request", "similar": "max_similarity"}

    count: Annotated[int, Field(gt=0, le=10**8)] = Field(description="Number of distinct prompts.")
    per_request: SmallCount = Field(10, description="Number of prompts per request.")
    examples: CountOrZero = Field(
        3, description="Number of examples from `path` per request, sampled anew for each."
    )
    max_similarity: Similarity = Field(
        0.6,
        description="Drop prompts that are at least this similar (Jaccard) to an earlier one or to "
        "one in `path`.",
    )
    temperature: SamplingTemperature = 1.0
    max_tokens: AnswerTokens = Field(
        1024, description="Maximum number of tokens in all prompts of one request."
    )


class PromptsRecipe(Section):
    """Prompts from a file, combined from templates, or written by the teacher."""

    path: PathText | None = Field(
        None,
        description="A text, JSONL, JSON, CSV, TSV, or Parquet file, optionally compressed, with "
        "prompts or logs of chat completions. With `write`: examples of the prompts to write.",
    )
    combine: CombineRecipe | None = None
    write: WriteRecipe | None = None
    format: PromptFormat = Field(
        "auto", description="The file's format. auto: decide by the extension."
    )
    key: str = Field("prompt", description="The column or key that contains the prompt.")
    limit: Tokens | None = Field(None, description="Use at most this many prompts.")
    samples: SmallCount = Field(1, description="Number of answers to each prompt.")
    system: str | None = Field(None, description="System prompt for prompts that do not have one.")
    examples: list[ExampleRecipe] = Field(
        default=[], description="Few-shot examples before every prompt."
    )
    student_sees: Literal["prompt", "system", "all"] = Field(
        "system",
        description="What the student sees in addition to the prompt: nothing (prompt), the system "
        "prompt (system), or the system prompt and the examples (all).",
    )

    @model_validator(mode="after")
    def _come_from_one_place(self) -> PromptsRecipe:
        if self.write is None and (self.path is None) == (self.combine is None):
            raise ValueError("set exactly one of path and combine")
        if self.write is not None and self.combine is None:
            raise ValueError("write needs combine, which describes the prompts to write")
        return self


# --- filters ------------------------------------------------------------------------------------


class EvaluationTexts(Section):
    path: PathText = Field(
        description="A file of prompts that must not be in the training text; see prompts.path."
    )
    format: PromptFormat = "auto"
    key: str = "prompt"
    ngram: Annotated[int, Field(ge=2, le=1000)] = Field(
        13,
        description="Drop rows that share this many consecutive words with an evaluation prompt.",
    )


class MajorityChoice(Section):
    """Keep the answers to a prompt that agree with the majority (self-consistency)."""

    renamed: ClassVar[Mapping[str, str]] = {"least": "min_agreement"}

    kind: Literal["majority"]
    pattern: str | None = Field(
        None,
        description="A regular expression; its last match in an answer, or that match's first "
        "group, is compared. null: compare the complete answer.",
    )
    min_agreement: ShareOrZero = Field(
        0.0, description="Minimum share of the answers that must agree."
    )
    keep: Literal["one", "all"] = Field(
        "one", description="Keep the first of the answers that agree, or all of them."
    )


class LikelihoodChoice(Section):
    """Keep the answer with the highest mean log-probability per token under the teacher."""

    kind: Literal["likelihood"]


class JudgeChoice(Section):
    """Keep the answer that a model prefers."""

    kind: Literal["judge"]
    teacher: TextTeacher = Field(description="The judge; same keys as synthesize.teacher.")
    criteria: str = Field(
        "It is correct and complete, does what was asked, and is clearly written.",
        description="Criteria for a good answer, which the judge is given.",
    )
    compare: Literal["scores", "pairs"] = Field(
        "scores",
        description="scores: score each answer from 1 to 10; pairs: compare each pair in both "
        "orders, with n(n - 1) requests for n answers.",
    )
    sampling: VerdictSampling = VerdictSampling()
    budget: BudgetRecipe = Field(BudgetRecipe(), description="A budget for the judge only.")

    @model_validator(mode="after")
    def _keys_fit_the_judge(self) -> JudgeChoice:
        check_text_teacher(self.teacher.api, self.sampling, self.budget)
        return self


Choice = Annotated[MajorityChoice | LikelihoodChoice | JudgeChoice, Field(discriminator="kind")]


class FiltersRecipe(Section):
    """Filters for answers. Empty answers are always dropped. dropped.jsonl lists every dropped row
    and the reason."""

    truncated: bool = Field(True, description="Drop answers that the token limit cut off.")
    min_characters: TokensOrZero | None = None
    max_characters: Tokens | None = None
    refusals: bool = Field(True, description="Drop answers that refuse to answer.")
    require_pattern: str | None = Field(
        None, description="Drop answers that do not match this regular expression."
    )
    forbid_pattern: str | None = Field(
        None, description="Drop answers that match this regular expression."
    )
    json_schema: PathText | None = Field(
        None, description="Drop answers that are not JSON matching the schema in this file."
    )
    languages: list[str] | None = Field(
        None,
        min_length=1,
        description="Drop answers that are clearly in none of these languages (ISO 639-1 codes, "
        "e.g. [en, de]). Needs stillhouse[language].",
    )
    best_of: Choice | None = Field(
        None, description="Keep the best of several answers to a prompt (prompts.samples)."
    )
    exact_duplicates: bool = Field(
        True, description="Drop rows whose prompt and answer repeat an earlier row's."
    )
    near_duplicates: Similarity | None = Field(
        None,
        description="Drop rows that are at least this similar (Jaccard) to an earlier one, e.g. "
        "0.8.",
    )
    decontaminate: EvaluationTexts | None = None

    @model_validator(mode="after")
    def _some_length_is_kept(self) -> FiltersRecipe:
        least, most = self.min_characters or 0, self.max_characters
        if most is not None and least > most:
            raise ValueError(
                f"min_characters ({least:,}) is greater than max_characters ({most:,})"
            )
        return self


class SynthesizeRecipe(Section):
    """Training text generated by a teacher: chats as JSONL, which `data` reads."""

    teacher: TextTeacher
    prompts: PromptsRecipe
    sampling: SamplingRecipe = SamplingRecipe()
    reasoning: Literal["strip", "keep"] = Field(
        "strip",
        description="Remove the teacher's reasoning, or keep it in <think> before the answer.",
    )
    filters: FiltersRecipe = FiltersRecipe()
    budget: BudgetRecipe = BudgetRecipe()
    journal: PathText | None = Field(
        None,
        description="SQLite file with every answer that was paid for; null: answers.sqlite next to "
        "the run folder, shared by all runs there.",
    )
    out: PathText = Field(
        "synthetic.jsonl",
        description="File for the result; a relative path starts from the recipe's folder.",
    )

    @model_validator(mode="after")
    def _keys_fit_the_teacher(self) -> SynthesizeRecipe:
        samples = self.prompts.samples
        check_text_teacher(self.teacher.api, self.sampling, self.budget, samples)
        if self.filters.best_of is not None and samples < 2:
            raise ValueError("filters.best_of chooses among several answers: set prompts.samples")
        return self

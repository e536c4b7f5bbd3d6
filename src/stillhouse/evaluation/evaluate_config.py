"""The recipe section `evaluate`: what is measured besides fidelity."""

from __future__ import annotations

from pydantic import Field

from stillhouse.field_types import AnswerTokens, CountOrZero, PathText, SamplingTemperature, Tokens
from stillhouse.section import Section


class LmEvalRecipe(Section):
    tasks: list[PathText] = Field(
        min_length=1, description="Task names of lm-eval, or paths of tasks."
    )
    include_path: PathText | None = Field(None, description="Folder with your own task files.")
    limit: Tokens | None = Field(None, description="Examples a task.")
    num_fewshot: CountOrZero | None = None


class EvaluateRecipe(Section):
    fine_tuning_baseline: bool = Field(
        False, description="Also train the same student by plain next-token loss, to compare."
    )
    prompts: list[str] = Field(default=[], description="Prompts for side-by-side generations.")
    max_new_tokens: AnswerTokens = 64
    temperature: SamplingTemperature = Field(0.0, description="0 is greedy.")
    speed: bool = Field(True, description="Measure prefill and decode tokens/s.")
    lm_eval: LmEvalRecipe | None = None

"""What is measured besides fidelity."""

from __future__ import annotations

from pydantic import Field

from stillhouse.section import Section


class LmEvalRecipe(Section):
    tasks: list[str] = Field(min_length=1, description="Task names of lm-eval, or paths of tasks.")
    include_path: str | None = Field(None, description="Folder with your own task files.")
    limit: int | None = Field(None, gt=0, description="Examples a task.")
    num_fewshot: int | None = Field(None, ge=0)


class EvaluateRecipe(Section):
    fine_tuning_baseline: bool = Field(
        False, description="Also train the same student by plain next-token loss, to compare."
    )
    prompts: list[str] = Field(default=[], description="Prompts for side-by-side generations.")
    max_new_tokens: int = Field(64, gt=0)
    temperature: float = Field(0.0, ge=0, strict=False, description="0 is greedy.")
    speed: bool = Field(True, description="Measure prefill and decode tokens/s.")
    lm_eval: LmEvalRecipe | None = None

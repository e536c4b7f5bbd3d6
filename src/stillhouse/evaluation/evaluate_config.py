"""The recipe section `evaluate`: what to measure besides fidelity."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from stillhouse.field_types import AnswerTokens, CountOrZero, PathText, SamplingTemperature, Tokens
from stillhouse.section import Section


class LmEvalRecipe(Section):
    tasks: list[PathText] = Field(
        min_length=1, description="Names of lm-eval tasks, or paths of task files."
    )
    include_path: PathText | None = Field(None, description="Folder with your own task files.")
    limit: Tokens | None = Field(
        None, description="Maximum number of examples per task; null: all."
    )
    num_fewshot: CountOrZero | None = Field(
        None, description="Number of few-shot examples; null: each task's default."
    )

    def located(self, base: Path) -> LmEvalRecipe:
        """The section with paths resolved relative to `base`; task names stay the same."""
        tasks = [str(base / task) if (base / task).is_file() else task for task in self.tasks]
        folder = None if self.include_path is None else str(base / self.include_path)
        return self.model_copy(update={"tasks": tasks, "include_path": folder})

    def task_files(self) -> list[Path]:
        """The files that define tasks, except lm-eval's own. Paths must already be resolved."""
        files = {Path(task) for task in self.tasks if Path(task).is_file()}
        if self.include_path is not None:
            found = Path(self.include_path).rglob("*")
            files |= {file for file in found if file.suffix in (".yaml", ".py") and file.is_file()}
        return sorted(files)


class OwnTextRecipe(Section):
    """Measurement on own text: every model answers the same prompts, and the teacher scores each
    token of the answers."""

    prompts: list[str] = Field(
        default=[],
        description="Prompts in the form of evaluate.prompts; empty: prompts from the held-out "
        "text.",
    )
    answers: CountOrZero = Field(
        32,
        description="Number of prompts from the held-out text to answer; 0: do not measure own "
        "text.",
    )
    max_tokens: AnswerTokens = Field(128, description="Maximum number of tokens per answer.")
    temperature: SamplingTemperature = Field(
        0.0, description="Sampling temperature of the answers; 0: greedy."
    )


class EvaluateRecipe(Section):
    fine_tuning_baseline: bool = Field(
        False, description="For comparison, also train the same student with next-token loss."
    )
    cut_baseline: bool = Field(
        False, description="For comparison, also measure the pruned student without its refit."
    )
    prompts: list[str] = Field(default=[], description="Prompts for side-by-side generations.")
    max_new_tokens: AnswerTokens = Field(64, description="Maximum number of tokens per generation.")
    temperature: SamplingTemperature = Field(
        0.0, description="Sampling temperature of the generations; 0: greedy."
    )
    speed: bool = Field(
        True, description="Measure prefill and decoding speed in tokens/s, and peak memory."
    )
    own_text: OwnTextRecipe | None = Field(
        None,
        description="Measure models on their own answers; null: only with train.on_policy.",
    )
    lm_eval: LmEvalRecipe | None = Field(
        None, description="Run benchmark tasks from EleutherAI's lm-eval."
    )

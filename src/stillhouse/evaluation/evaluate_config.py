"""The recipe section `evaluate`: what is measured besides fidelity."""

from __future__ import annotations

from pathlib import Path

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

    def located(self, base: Path) -> LmEvalRecipe:
        """The section with complete paths, which start at `base`; names of tasks are kept."""
        tasks = [str(base / task) if (base / task).is_file() else task for task in self.tasks]
        folder = None if self.include_path is None else str(base / self.include_path)
        return self.model_copy(update={"tasks": tasks, "include_path": folder})

    def task_files(self) -> list[Path]:
        """Of a section with complete paths: the files that define its tasks; lm-eval's own are
        left out."""
        files = {Path(task) for task in self.tasks if Path(task).is_file()}
        if self.include_path is not None:
            found = Path(self.include_path).rglob("*")
            files |= {file for file in found if file.suffix in (".yaml", ".py") and file.is_file()}
        return sorted(files)


class OwnTextRecipe(Section):
    """Every model answers the same prompts, and the teacher scores each token of its answers."""

    prompts: list[str] = Field(
        default=[], description="Prompts, as evaluate.prompts; none: those of the held-out text."
    )
    answers: CountOrZero = Field(
        32, description="Prompts of the held-out text to answer; 0: own text is not measured."
    )
    max_tokens: AnswerTokens = Field(128, description="Limit for one answer.")
    temperature: SamplingTemperature = Field(0.0, description="Of the answers; 0: greedy.")


class EvaluateRecipe(Section):
    fine_tuning_baseline: bool = Field(
        False, description="Also train the same student by plain next-token loss, to compare."
    )
    cut_baseline: bool = Field(
        False, description="Also measure the pruned student without its refit, to compare."
    )
    prompts: list[str] = Field(default=[], description="Prompts for side-by-side generations.")
    max_new_tokens: AnswerTokens = 64
    temperature: SamplingTemperature = Field(0.0, description="0 is greedy.")
    speed: bool = Field(True, description="Measure prefill and decode tokens/s.")
    own_text: OwnTextRecipe | None = Field(
        None,
        description="Measure the models on their own answers; null: only with train.on_policy.",
    )
    lm_eval: LmEvalRecipe | None = None

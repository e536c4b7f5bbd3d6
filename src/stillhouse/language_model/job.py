"""A language-model recipe with its models located: the input to every stage of its run."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from stillhouse.errors import SignalError
from stillhouse.export.licenses import Origin
from stillhouse.hardware import Precision, choose_precision
from stillhouse.language_model.recipe import Recipe, TeacherRecipe
from stillhouse.objectives.objective_config import ChunksTerm, LogitsTerm
from stillhouse.runfolder import Stage
from stillhouse.signals.encodings import (
    AnswerChunks,
    Encoding,
    FrozenHead,
    Hidden,
    Stratified,
    TopK,
    TopP,
)
from stillhouse.signals.manifest import read_settings
from stillhouse.signals.signals_config import (
    FrozenHeadSignals,
    HiddenSignals,
    SignalsRecipe,
)
from stillhouse.students.build_student import planned_config
from stillhouse.students.student_config import PretrainedStudent, PrunedStudent, RandomStudent
from stillhouse.synthesis.synthesized_text import SynthesizedText
from stillhouse.teachers.load_model import load_config, load_tokenizer
from stillhouse.teachers.model_requirements import require_decoder
from stillhouse.teachers.model_source import (
    ModelSource,
    resolve_config,
    resolve_model,
    resolve_tokenizer,
)
from stillhouse.teachers.several_teachers import check_one_teacher
from stillhouse.teachers.shared_vocabulary import check_rows, check_same_ids, token_count
from stillhouse.teachers.source_tokenizers import (
    head_rows,
    other_tokenizer,
    shared_vocabulary,
)
from stillhouse.teachers.stored_teacher import check_head_frozen, check_layers, recorded_temperature
from stillhouse.training.objective import (
    Objective,
    objective_for,
    stored_layers,
)
from stillhouse.training.train import MODEL
from stillhouse.training.train_config import ORIGINAL


@dataclass(frozen=True)
class Job:
    """A recipe with its models located and checked to fit together.

    base: the folder that relative paths refer to. pruned: the model to prune, if it is not the
    teacher. vocabulary: the number of token ids that the student uses, and the teacher unless
    `folded`; further rows of an LM head are padding. teachers: the models that the student learns
    from: the teacher or others. own_tokenizer: the source of the student's tokenizer, if it is
    neither the pretrained model's nor the teacher's. folded: whether the teacher's tokenizer
    differs from the student's, so that they are compared over shared roots. roots: the stage with
    the roots of other tokenizers. text: the run's synthesized text. ancestors: for a family's
    member, the models that the first member was made from. after_cut: before the vocabulary is cut,
    the recipe to continue with afterward; this job's own recipe then contains only the cut. cut:
    whether the vocabulary was cut. family: for a first member, the entire family's recipe.
    """

    recipe: Recipe
    base: Path
    teacher: ModelSource
    pretrained: ModelSource | None
    vocabulary: int
    pruned: ModelSource | None = None
    teachers: tuple[ModelSource, ...] = ()
    own_tokenizer: ModelSource | None = None
    folded: bool = False
    roots: Stage | None = None
    text: SynthesizedText | None = None
    ancestors: tuple[Origin, ...] = ()
    after_cut: Recipe | None = None
    cut: bool = False
    family: Recipe | None = None

    @property
    def tokenizer(self) -> ModelSource:
        """The model or folder with the student's tokenizer and chat template."""
        return self.own_tokenizer or self.pretrained or self.teacher

    @property
    def other_teachers(self) -> tuple[ModelSource, ...]:
        """The models whose tokenizer differs from the student's, among those that it learns from
        and the teacher that it is compared with."""
        every = dict.fromkeys([*self.teachers, self.teacher])
        return tuple(each for each in every if other_tokenizer(self.tokenizer, each))

    @property
    def precision(self) -> Precision:
        """The precision of products in models that are not trained."""
        return choose_precision(self.recipe.train.precision)

    @property
    def served(self) -> torch.dtype:
        """The dtype of exported weights."""
        dtype: torch.dtype = getattr(torch, self.recipe.export.dtype)
        return dtype

    @property
    def start(self) -> ModelSource:
        """The model that the student is made from, or shaped like."""
        return self.pretrained or self.pruned or self.teacher

    def model(self, stage: Stage) -> ModelSource:
        """Return the student that a stage of this run wrote."""
        return self.start.derived(stage.path / MODEL)


def find_models(
    recipe: Recipe, base: Path, *, weights: bool = True, teacher: ModelSource | None = None
) -> Job:
    """Locate the models on disk or download them, and check them.

    weights: False to skip the weights when downloading. teacher: a teacher to use instead of the
    recipe's, for example one with a cut vocabulary.
    Raises ModelError, or RecipeError if the student cannot be trained on the teacher's token ids.
    """
    section, trusted = recipe.teacher, recipe.teacher.trust_remote_code
    find = partial(resolve_model, base=base, weights=weights, trusted=trusted)
    if teacher is None:
        teacher = find(section.model, revision=section.revision)
    pretrained = None
    if isinstance(recipe.student, PretrainedStudent):
        student = recipe.student
        pretrained = find(
            student.model, revision=student.revision, trusted=student.trust_remote_code
        )
    pruned = None
    if isinstance(recipe.student, PrunedStudent) and recipe.student.model is not None:
        pruned = find(recipe.student.model)
    other = pretrained or pruned or teacher
    for source in (teacher, other):
        require_decoder(load_config(source), source.path)
    own = None
    if isinstance(recipe.student, RandomStudent) and recipe.student.tokenizer is not None:
        own = resolve_tokenizer(recipe.student.tokenizer, base=base, trusted=trusted)
    if section.tokenizer == "same":
        check_same_ids(load_tokenizer(teacher), load_tokenizer(own or other))
    folded = other_tokenizer(own or other, teacher)
    if own is not None:
        rows = token_count(load_tokenizer(own))
    elif folded:
        own = pruned
        rows = check_rows(load_tokenizer(other), head_rows(other), "student")
    else:
        rows = shared_vocabulary(teacher, other).rows
    job = Job(recipe, base, teacher, pretrained, rows, pruned, own_tokenizer=own, folded=folded)
    job = replace(job, teachers=_teachers(job, weights=weights))
    require_decoder(configs(job)[0], recipe.student.start)
    # Reject early what these models, or a store of the teacher's signals, cannot provide.
    objective = planned_objective(job)
    if recipe.signals is not None:
        recorded_temperature(signals_encoding(job, objective), objective.needs)
    return job


def find_configurations(recipe: Recipe, base: Path) -> Job:
    """Return the job as far as configurations determine it, without weights or tokenizers.

    The vocabulary is that of the smaller LM head. Raises ModelError, RecipeError, and SignalError
    like `find_models`.
    """
    section, student = recipe.teacher, recipe.student

    def found(name: str, of: TeacherRecipe | PretrainedStudent | None = None) -> ModelSource:
        """Locate a model. of: the section that names it, if the section has its own revision."""
        revision = None if of is None else of.revision
        folder = resolve_config(name, revision=revision, base=base)
        trusted = (of or section).trust_remote_code
        source = ModelSource(folder, described=name, trusted=trusted)
        require_decoder(load_config(source), folder)
        return source

    teacher = found(section.model, section)
    pretrained = pruned = None
    if isinstance(student, PretrainedStudent):
        pretrained = found(student.model, student)
    if isinstance(student, PrunedStudent) and student.model is not None:
        pruned = found(student.model)
    names = recipe.train.teachers or [ORIGINAL]
    teachers = tuple(teacher if name == ORIGINAL else found(name) for name in names)
    job = Job(recipe, base, teacher, pretrained, 1, pruned, teachers)
    sizes = [int(config.get_text_config().vocab_size) for config in configs(job)]
    return replace(job, vocabulary=min(sizes))


def _teachers(job: Job, *, weights: bool) -> tuple[ModelSource, ...]:
    recipe, teachers = job.recipe, []
    for name in recipe.train.teachers or [ORIGINAL]:
        found = job.teacher
        if name != ORIGINAL:
            trusted = recipe.teacher.trust_remote_code
            found = resolve_model(name, base=job.base, weights=weights, trusted=trusted)
        if other_tokenizer(job.tokenizer, found):
            _require_output_terms(recipe, found)
        else:
            check_rows(load_tokenizer(found), head_rows(found), "teacher")
        teachers.append(found)
    return tuple(teachers)


def _require_output_terms(recipe: Recipe, other: ModelSource) -> None:
    terms = recipe.objective.terms
    if any(not isinstance(term, LogitsTerm | ChunksTerm) for term in terms):
        raise SignalError(
            f"terms on hidden states or attention compare positions, but {other.described} has a "
            "different tokenizer, so its positions are not the student's",
            where="objective.terms",
            fix="use divergences at the output, terms on chunks, or teachers with the student's "
            "tokenizer",
        )


def signals_encoding(job: Job, objective: Objective) -> Encoding:
    """Return the encoding of the teacher's signals.

    Raises SignalError or StoreError if an existing store cannot be used for this recipe.
    """
    section = job.recipe.signals
    assert section is not None
    student, teacher = (config.get_text_config() for config in configs(job))
    if section.store is not None:
        store = job.base / section.store
        encoding = read_settings(store).encoding
        if isinstance(encoding, Hidden):
            check_layers(encoding, stored_layers(objective, teacher), store)
        if isinstance(encoding, FrozenHead):
            _check_head_stays(job.recipe, store)
        return encoding
    if section.answers is not None:
        if section.missing == "live" and (job.folded or objective.chunks):
            raise SignalError(
                f"{job.teacher.described} cannot score the text that signals.answers lacks: "
                + (
                    "it has a different tokenizer"
                    if job.folded
                    else "terms on chunks only work with the API's answers"
                ),
                where="signals.missing",
                fix="remove it, and train only on the text that the API generated",
            )
        if objective.chunks:
            return AnswerChunks()
        assert job.recipe.synthesize is not None
        most = job.recipe.synthesize.sampling.top_logprobs
        assert most is not None
        return TopP(1.0, most)
    if job.folded:
        _check_foldable(section, job.teacher)
    match section.encoding:
        case HiddenSignals():
            _check_last_only(section, stored_layers(objective, teacher), teacher.num_hidden_layers)
            return Hidden(stored_layers(objective, teacher), teacher.hidden_size)
        case FrozenHeadSignals():
            _check_head_stays(job.recipe, "signals.encoding")
            return FrozenHead(student.hidden_size)
        case encoding_section:
            return within_vocabulary(encoding_section.encoding(), job.vocabulary)


def _check_foldable(section: SignalsRecipe, teacher: ModelSource) -> None:
    """Raise SignalError if the signals cannot be stored over the roots of two vocabularies."""
    kind = section.encoding.kind
    if isinstance(section.encoding, HiddenSignals | FrozenHeadSignals) or section.top_tokens:
        what = f"signals of kind {kind}" + (" from a server" if section.top_tokens else "")
        raise SignalError(
            f"{teacher.described} has a different tokenizer, and {what} cannot be stored for the "
            "student's tokens",
            where="signals.encoding",
            fix="use the default encoding, threshold, or another encoding of complete "
            "distributions (for a local teacher, top_k works too); or remove `signals`",
        )


def _check_last_only(section: SignalsRecipe, layers: tuple[int, ...], last: int) -> None:
    """Raise SignalError if a layer other than the last is needed from a server, which returns only
    the last hidden states, or from a vLLM whose processes have only some of the layers."""
    lacking = [layer for layer in layers if layer != last]
    used = f"but a term uses layer {', '.join(map(str, lacking))}"
    if lacking and section.server is not None:
        raise SignalError(
            f"a server returns only the last hidden states, {used}",
            where="signals.server",
            fix="run vLLM on this machine instead (signals.vllm), use a local teacher, or use only "
            "terms on the output",
        )
    if lacking and section.vllm is not None and section.vllm.pipeline_parallel > 1:
        raise SignalError(
            f"with pipeline_parallel, vLLM returns only the last hidden states, {used}",
            where="signals.vllm.pipeline_parallel",
            fix="use tensor_parallel instead, use a local teacher, or use only terms on the output",
        )


def within_vocabulary(encoding: Encoding, vocabulary: int) -> Encoding:
    """Return the encoding. Raises SignalError if it stores more tokens per position than the
    vocabulary has."""
    match encoding:
        case TopK(k=most) | Stratified(k=most) | TopP(most=most) if most > vocabulary:
            raise SignalError(
                f"cannot store {most} tokens per position: the vocabulary has only {vocabulary}",
                where="signals.encoding",
                fix=f"store {vocabulary} or fewer",
            )
    return encoding


def _check_head_stays(recipe: Recipe, where: str | Path) -> None:
    check_head_frozen(recipe.train.freeze_head, where)
    if recipe.quantize is not None and recipe.quantize.qat is not None:
        raise SignalError(
            "quantize.qat rounds the head, but signals of kind frozen_head need the original head",
            where=where,
            fix="remove quantize.qat, or use a different kind of signals",
        )


def planned_objective(job: Job) -> Objective:
    """Build the objective before there is a student, with its learned maps on the meta device.

    Raises SignalError if these models do not support a term.
    """
    student, teacher = configs(job)[0], load_config(job.teachers[0])
    with torch.device("meta"):
        objective = objective_for(job.recipe.objective, student, teacher)
    if len(job.teachers) > 1:
        check_one_teacher(objective.needs.activations)
    return objective


def configs(job: Job) -> tuple[Any, Any]:
    """Return the student's planned configuration and the teacher's configuration."""
    student, section = load_config(job.start), job.recipe.student
    if isinstance(section, PrunedStudent | RandomStudent):
        student = planned_config(
            section, student, job.base, served=job.served, tokenizer=job.own_tokenizer
        )
    return student, load_config(job.teacher)


def full_job(job: Job) -> Job:
    """Return the job of the full recipe, if this job covers only the steps before the vocabulary is
    cut; otherwise, this job."""
    return job if job.after_cut is None else replace(job, recipe=job.after_cut, after_cut=None)

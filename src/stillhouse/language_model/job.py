"""A language-model recipe with its resolved models: the input of every stage of its run."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from stillhouse import account
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
from stillhouse.students.planned_config import planned_config
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
from stillhouse.teachers.planned_model import planned_model
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
    """A recipe with its resolved models, checked to fit together.

    base: the folder of relative paths. pruned: the model that is pruned, if that is not the
    teacher. vocabulary: token ids below it are the student's, and the teacher's unless `folded`;
    rows of a head beyond it are padding. teachers: the models that the student learns from: the
    teacher, or others. own_tokenizer: whose tokenizer the student has, if that is neither the
    pretrained model's nor the teacher's. folded: whether the teacher has another tokenizer than the
    student, so that they are compared over shared roots. roots: the stage with the roots of other
    tokenizers. text: the run's synthesized text. ancestors: for a member of a family, the models
    that the first member was made with. after_cut: before the vocabulary is cut, the recipe that
    continues afterwards; this job's own recipe then contains only the cut. cut: whether it was cut.
    family: for a first member, the recipe of the entire family.
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
        """The model, or folder, whose tokenizer and chat template the student has."""
        return self.own_tokenizer or self.pretrained or self.teacher

    @property
    def other_teachers(self) -> tuple[ModelSource, ...]:
        """The models with another tokenizer than the student: of those that it learns from, and the
        teacher that it is compared with."""
        every = dict.fromkeys([*self.teachers, self.teacher])
        return tuple(each for each in every if other_tokenizer(self.tokenizer, each))

    @property
    def precision(self) -> Precision:
        """Of the products of models that are not trained."""
        return choose_precision(self.recipe.train.precision)

    @property
    def served(self) -> torch.dtype:
        """The number type of exported weights."""
        dtype: torch.dtype = getattr(torch, self.recipe.export.dtype)
        return dtype

    @property
    def start(self) -> ModelSource:
        """The model that the student is made from, or shaped like."""
        return self.pretrained or self.pruned or self.teacher

    def model(self, stage: Stage) -> ModelSource:
        """The student that a stage of this run wrote."""
        return self.start.derived(stage.path / MODEL)


def find_models(
    recipe: Recipe, base: Path, *, weights: bool = True, teacher: ModelSource | None = None
) -> Job:
    """Find and check the models on disk, or download them (weights=False: all but their weights).

    teacher: used instead of the recipe's, for example one with a cut vocabulary (see `beginning`).
    Raises ModelError; RecipeError for a student that cannot be trained on the teacher's token ids.
    """
    section = recipe.teacher
    find = partial(resolve_model, base=base, weights=weights, trusted=section.trust_remote_code)
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
        trusted = section.trust_remote_code
        own = resolve_tokenizer(recipe.student.tokenizer, base=base, trusted=trusted)
    folded = _is_folded(recipe, teacher, own or other)
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
    # Reject early what these models, or a store of the teacher's signals, cannot serve.
    objective = planned_objective(job)
    if recipe.signals is not None:
        recorded_temperature(signals_encoding(job, objective), objective.needs)
    return job


def find_configurations(recipe: Recipe, base: Path) -> Job:
    """The job as far as configurations tell: neither weights nor tokenizers need be there.

    The vocabulary is that of the smaller head. Raises ModelError, RecipeError and SignalError as
    `find_models`.
    """
    section, student = recipe.teacher, recipe.student

    def found(name: str, of: TeacherRecipe | PretrainedStudent | None = None) -> ModelSource:
        """of: the section that names the model, if it is one with a revision of its own."""
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


def _is_folded(recipe: Recipe, teacher: ModelSource, own: ModelSource) -> bool:
    """Whether the teacher has another tokenizer than the student. own: has the student's.

    Raises ModelError if the recipe does not allow it.
    """
    if recipe.teacher.tokenizer == "same":
        check_same_ids(load_tokenizer(teacher), load_tokenizer(own))
    return other_tokenizer(own, teacher)


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
            f"{other.described} has another tokenizer, so its positions are not the student's, and "
            "terms on hidden states or attention compare positions",
            where="objective.terms",
            fix="use divergences at the output, terms on chunks, or teachers with the student's "
            "tokenizer",
        )


def signals_encoding(job: Job, objective: Objective) -> Encoding:
    """The encoding of the teacher's signals.

    Raises SignalError, StoreError for a given store that cannot serve this recipe.
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
        _check_answers(job, objective)
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
            if section.server is not None:
                _check_last_only(stored_layers(objective, teacher), teacher.num_hidden_layers)
            return Hidden(stored_layers(objective, teacher), teacher.hidden_size)
        case FrozenHeadSignals():
            _check_head_stays(job.recipe, "signals.encoding")
            return FrozenHead(student.hidden_size)
        case encoding_section:
            return within_vocabulary(encoding_section.encoding(), job.vocabulary)


def _check_answers(job: Job, objective: Objective) -> None:
    """Raise SignalError if the recipe's teacher is to answer for what an API's answers lack, and
    cannot."""
    section = job.recipe.signals
    if section is None or section.missing != "live" or not (job.folded or objective.chunks):
        return
    raise SignalError(
        f"{job.teacher.described} cannot answer for text that signals.answers lack: "
        + ("it has another tokenizer" if job.folded else "terms on chunks are for the API alone"),
        where="signals.missing",
        fix="remove it, and train only on the text that the API wrote",
    )


def _check_foldable(section: SignalsRecipe, teacher: ModelSource) -> None:
    """Raise SignalError for signals that cannot be stored over the roots of two vocabularies."""
    kind = section.encoding.kind
    if isinstance(section.encoding, HiddenSignals | FrozenHeadSignals) or section.top_tokens:
        what = f"signals of kind {kind}" + (" from a server" if section.top_tokens else "")
        raise SignalError(
            f"{teacher.described} has another tokenizer, and {what} cannot be stored for the "
            "student's tokens",
            where="signals.encoding",
            fix="use threshold, the default, or another encoding of complete distributions (of a "
            "local teacher top_k, too); or remove signals",
        )


def _check_last_only(layers: tuple[int, ...], last: int) -> None:
    """Raise SignalError if a server, which returns the last hidden states, lacks a layer."""
    lacking = [layer for layer in layers if layer != last]
    if lacking:
        raise SignalError(
            f"a server returns the last hidden states, and a term uses layer "
            f"{', '.join(map(str, lacking))}",
            where="signals.server",
            fix="run vLLM on this machine instead (signals.vllm), use a local teacher, or use only "
            "terms on the output",
        )


def within_vocabulary(encoding: Encoding, vocabulary: int) -> Encoding:
    """Raise SignalError if more tokens per position are stored than there are in the vocabulary."""
    most = 0
    if isinstance(encoding, TopK | Stratified):
        most = encoding.k
    elif isinstance(encoding, TopP):
        most = encoding.most
    if most > vocabulary:
        raise SignalError(
            f"{most} tokens of each position are more than the {vocabulary} of the vocabulary",
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
            fix="remove quantize.qat, or use signals of another kind",
        )


def planned_objective(job: Job) -> Objective:
    """The objective before there is a student: its learned maps are on the meta device.

    Raises SignalError for terms that these models cannot serve.
    """
    student, teacher = configs(job)[0], job.teachers[0]
    shape = load_config(teacher)
    with torch.device("meta"):
        objective = objective_for(job.recipe.objective, student, shape)
    if len(job.teachers) > 1:
        check_one_teacher(objective.needs.activations)
    return objective


def configs(job: Job) -> tuple[Any, Any]:
    """The student's planned configuration, and the teacher's."""
    teacher, section = load_config(job.teacher), job.recipe.student
    if isinstance(section, PrunedStudent | RandomStudent):
        start = start_config(job)
        planned = planned_config(
            section, start, job.base, served=job.served, tokenizer=job.own_tokenizer
        )
        return planned, teacher
    assert job.pretrained is not None
    return load_config(job.pretrained), teacher


def full_job(job: Job) -> Job:
    """The job of the full recipe, if this job covers only the steps before the vocabulary is
    cut."""
    return job if job.after_cut is None else replace(job, recipe=job.after_cut, after_cut=None)


def start_config(job: Job) -> Any:
    """The configuration of the model that is pruned."""
    return load_config(job.pruned or job.teacher)


def planned_size(config: Any) -> account.ParameterCount:
    """The planned size of a model."""
    return account.count_parameters(planned_model(config))

"""The stage that cuts the teacher's vocabulary.

A student with fewer tokens learns from a teacher whose embeddings and LM head lack the same rows,
so the teacher's distribution over the remaining tokens is renormalized. Other models that the
recipe prunes or learns from lose the same rows, so that there is a single vocabulary, as in every
run. With `removed_tokens: fold`, teachers are left whole and teach like teachers with a different
tokenizer; the student starts from the cut teacher and is measured against it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stillhouse.data.windows import WindowSet
from stillhouse.errors import RecipeError
from stillhouse.evaluation.fidelity import compare, heldout_answers
from stillhouse.hardware import default_device, peak_memory_bytes
from stillhouse.language_model.data_stage import open_data
from stillhouse.language_model.job import Job, find_models
from stillhouse.language_model.recipe import Recipe
from stillhouse.launch import leads
from stillhouse.objectives.objective_config import ChunksTerm, LogitsTerm
from stillhouse.pipeline.stage_plan import Do, model_check
from stillhouse.pruning.pruning_config import VocabularyFile
from stillhouse.pruning.shapes import Counter
from stillhouse.pruning.sizes import sizes_of
from stillhouse.pruning.vocabulary_cut import KEPT_IDS, load_kept_ids
from stillhouse.runfolder import Outcome, Stage, StagePlan
from stillhouse.shared_work import all_processes
from stillhouse.students.build_student import build_student
from stillhouse.students.student_config import PrunedStudent
from stillhouse.teachers.align_tokens import require_alignable
from stillhouse.teachers.load_model import load_config, load_model, load_tokenizer
from stillhouse.teachers.model_source import ModelSource, resolve_model
from stillhouse.teachers.source_tokenizers import other_tokenizer, shared_vocabulary
from stillhouse.training.train import MODEL
from stillhouse.training.train_config import ORIGINAL

MEASURED_TOKENS = 8192
"""The number of training tokens on which the cut teacher is compared with the original."""


def find_job(recipe: Recipe, base: Path, *, weights: bool = True) -> Job:
    """Return the job that a run starts with. Arguments and errors: as for `find_models`."""
    section = recipe.student
    if not isinstance(section, PrunedStudent) or section.vocabulary is None:
        return find_models(recipe, base, weights=weights)
    only_cut = PrunedStudent(
        start="pruned",
        vocabulary=section.vocabulary,
        calibration_tokens=section.calibration_tokens,
    )
    alone = recipe.train.model_copy(update={"teachers": []})
    changes = {"student": only_cut, "signals": None, "train": alone}
    job = find_models(recipe.model_copy(update=changes), base, weights=weights)
    _other_models(recipe, job)
    if section.removed_tokens == "fold":
        _require_fold(recipe, job)
    return replace(job, after_cut=recipe)


def _require_fold(recipe: Recipe, job: Job) -> None:
    """Raise RecipeError if the recipe uses something that does not work with whole teachers, and
    ModelError if their tokens cannot be aligned."""
    tokenizer = load_tokenizer(job.teacher)
    require_alignable(tokenizer, tokenizer)
    own = recipe.train.on_policy
    reasons = {
        "signals are stored for the cut teacher": recipe.signals is not None,
        "terms on hidden states or attention compare positions, which differ where the student "
        "needs more tokens": any(
            not isinstance(term, LogitsTerm | ChunksTerm) for term in recipe.objective.terms
        ),
        "train.on_policy.teacher_tokens needs a teacher with the student's tokens": (
            own is not None and own.teacher_tokens > 0
        ),
    }
    for reason, found in reasons.items():
        if found:
            raise RecipeError(
                f"the student cannot learn from the whole teacher: {reason}",
                where="student.removed_tokens",
                fix="use removed_tokens: renormalize",
            )


def cut_job(job: Job, finished: Mapping[str, Stage], do: Do) -> Job:
    """Return the job after its teacher's vocabulary is cut, cutting the other models the same
    way."""
    assert job.after_cut is not None
    cut, data = finished["vocabulary"], finished["data"]
    kept = cut.summary["vocabulary"][1]
    teacher = ModelSource(
        cut.path / MODEL,
        cut.digest,
        f"{job.teacher.described}, cut to {kept:,} tokens",
        card=job.teacher.path,
        trusted=job.teacher.trusted,
    )
    others = _other_models(job.after_cut, job)
    stages = {
        name: do(plan_vocabulary(_alike(job, source, cut), data)) for name, source in others.items()
    }
    paths = {name: str((stage.path / MODEL).absolute()) for name, stage in stages.items()}
    left = _left(job.after_cut, paths, teacher)
    found = find_models(left, job.base, teacher=teacher)
    if _folds(job.after_cut):
        whole = tuple(job.teacher if each is teacher else each for each in found.teachers)
        found = replace(found, teachers=whole)
    return replace(found, text=job.text, ancestors=job.ancestors, cut=True)


def _other_models(recipe: Recipe, full_job: Job) -> dict[str, ModelSource]:
    """Return the models other than the teacher that have all of its tokens, by name.

    Leaves out a family's members, whose vocabulary is already cut, and teachers with a different
    tokenizer. Raises RecipeError if the student's start has different tokens.
    """
    assert isinstance(recipe.student, PrunedStudent)
    names = [recipe.student.model, *([] if _folds(recipe) else recipe.train.teachers)]
    found = {}
    for name in dict.fromkeys(name for name in names if name not in (None, ORIGINAL)):
        trusted = recipe.teacher.trust_remote_code
        source = resolve_model(name, base=full_job.base, trusted=trusted)
        own, all_tokens = (
            load_tokenizer(model).get_vocab().keys() for model in (source, full_job.teacher)
        )
        other = not own < all_tokens and other_tokenizer(full_job.teacher, source)
        if other and name == recipe.student.model:
            raise RecipeError(
                "student.vocabulary removes tokens from the teacher, but the model to prune has a "
                "different tokenizer",
                where="student.model",
                fix="set the teacher to the model to prune, and name the other in train.teachers",
            )
        if not other and not own < all_tokens:
            shared_vocabulary(full_job.teacher, source)
            found[name] = source
    return found


def _folds(recipe: Recipe) -> bool:
    """Whether teachers keep all of their tokens."""
    return isinstance(recipe.student, PrunedStudent) and recipe.student.removed_tokens == "fold"


def _alike(full_job: Job, other: ModelSource, cut: Stage) -> Job:
    """Return the job that cuts another model to the tokens that the teacher has kept."""
    kept = VocabularyFile(path=str((cut.path / MODEL / KEPT_IDS).absolute()))
    section = PrunedStudent(start="pruned", vocabulary=kept)
    return replace(
        full_job, teacher=other, recipe=full_job.recipe.model_copy(update={"student": section})
    )


def _left(recipe: Recipe, cut: Mapping[str, str], teacher: ModelSource) -> Recipe:
    """Return the recipe that remains after its models are cut. cut: the cut models' folders, by
    name.

    If nothing else is to be cut, the student is its start model with all layers.
    """
    section = recipe.student
    assert isinstance(section, PrunedStudent)
    model = section.model and cut.get(section.model, section.model)
    left: dict[str, Any] = {"vocabulary": None, "model": model}
    if not section.sizes and section.target is None:
        start = teacher.derived(Path(model)) if model else teacher
        left["layers"] = sizes_of(load_config(start)).layers
    teachers = recipe.train.teachers
    if not _folds(recipe):
        teachers = [cut.get(name, name) for name in teachers]
    return recipe.model_copy(
        update={
            "student": section.model_copy(update=left),
            "train": recipe.train.model_copy(update={"teachers": teachers}),
        }
    )


def plan_vocabulary(job: Job, data: Stage) -> StagePlan:
    """Plan cutting the job's teacher, and its tokenizer, to the tokens that the recipe keeps."""
    section = job.recipe.student
    assert isinstance(section, PrunedStudent)

    def work(out: Path) -> Outcome:
        windows, _ = open_data(data)
        summary = build_student(
            section,
            teacher=job.teacher,
            windows=windows,
            seed=job.recipe.seed,
            base=job.base,
            out=out / MODEL,
            processes=all_processes(),
        )
        if not leads():
            return Outcome()
        config = load_config(job.teacher)
        parameters = Counter(config).total(sizes_of(config))
        found = {
            "vocabulary": summary["pruning"]["changed"].get("vocabulary", [job.vocabulary] * 2),
            "parameters": [parameters, summary["parameters"]["total"]],
            **_perplexities(job, out / MODEL, windows),
        }
        return Outcome(flops=summary["flops"], peak_memory_bytes=peak_memory_bytes(), summary=found)

    inputs = {
        "vocabulary": _named_tokens(section, job.base),
        "calibration_tokens": section.calibration_tokens,
        "seed": job.recipe.seed,
        "teacher": job.teacher.fingerprint,
        "data": data.digest,
    }
    check = model_check(job.teacher)
    return StagePlan("vocabulary", inputs, work, version=4, together=True, check=check)


def _named_tokens(section: PrunedStudent, base: Path) -> int | str | None:
    """Return the tokens that the recipe keeps; for a file, the hash of its content."""
    if not isinstance(section.vocabulary, VocabularyFile):
        return section.vocabulary
    file = base / section.vocabulary.path
    # A missing file raises an error when it is read.
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else None


def _perplexities(job: Job, cut: Path, windows: WindowSet) -> dict[str, Any]:
    """Measure the perplexities of the original and the cut teacher on training text that has only
    kept tokens."""
    kept_ids = load_kept_ids(cut)
    assert kept_ids is not None
    new_V = torch.full((max(job.vocabulary, max(kept_ids) + 1),), -1)
    new_V[list(kept_ids)] = torch.arange(len(kept_ids))
    sample = range(min(len(windows), 1 + MEASURED_TOKENS // len(windows[0]["labels"])))
    rows = [windows[i] for i in sample if bool((new_V[windows[i]["input_ids"]] >= 0).all())]
    found: dict[str, Any] = {"measured_share": len(rows) / len(sample)}
    if not rows:
        return found
    dtype = job.precision.dtype
    for name, source, of_rows in (
        ("teacher_perplexity", job.teacher, rows),
        ("cut_perplexity", job.teacher.derived(cut), [_renumbered(row, new_V) for row in rows]),
    ):
        model = load_model(source, dtype=dtype)
        answers = heldout_answers(model.to(default_device()), of_rows)
        size = model.get_output_embeddings().weight.shape[0]
        found[name] = compare(answers, answers, min(size, job.vocabulary)).perplexity
    return found


def _renumbered(row: dict[str, Tensor], new_V: Tensor) -> dict[str, Tensor]:
    labels_L = row["labels"]
    new_L = torch.where(labels_L >= 0, new_V[labels_L.clamp(min=0)], labels_L)
    return {**row, "input_ids": new_V[row["input_ids"]], "labels": new_L}

"""A run's first stages: the text that it makes, its data, and the teacher cut to fewer tokens.

A student with fewer tokens is trained under a teacher that has lost the same rows of its embeddings
and head: its distribution over the tokens that are left is the teacher's own, made to sum to 1. So
from the second stage on there is one vocabulary, as in every run.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stillhouse.data import WindowSet
from stillhouse.evaluate.fidelity import compare, heldout_answers
from stillhouse.hardware import choose_precision, default_device, peak_memory_bytes
from stillhouse.job import Job, find_models
from stillhouse.pruning import load_kept_ids
from stillhouse.recipe import Recipe
from stillhouse.recipe.pruning import VocabularyFile
from stillhouse.recipe.schema import PrunedStudent
from stillhouse.runfolder import Outcome, Stage
from stillhouse.stages import Do, StagePlan, open_data, plan_data
from stillhouse.stages.synthesis import synthesized
from stillhouse.students import build_student
from stillhouse.teachers import ModelSource, load_model
from stillhouse.training import MODEL

MEASURED_TOKENS = 8192
"""Of the training text, on which the cut teacher is compared with the whole one."""


def begin(recipe: Recipe, base: Path, do: Do, *, weights: bool = True) -> tuple[Job, Stage]:
    """A run's job and its data. weights: as in `find_models`."""
    section = recipe.student
    if not isinstance(section, PrunedStudent) or section.vocabulary is None:
        job = find_models(recipe, base, weights=weights)
        # After the models: what is wrong with them is found before a teacher is paid.
        job = replace(job, text=synthesized(recipe, base, do))
        return job, do(plan_data(job))
    only_cut = PrunedStudent(start="pruned", vocabulary=section.vocabulary)
    whole = find_models(recipe.model_copy(update={"student": only_cut, "signals": None}), base)
    whole = replace(whole, text=synthesized(recipe, base, do))
    cut = do(vocabulary(whole, do(plan_data(whole))))
    kept = cut.summary["vocabulary"][1]
    teacher = ModelSource(
        cut.path / MODEL,
        cut.digest,
        f"{whole.teacher.described}, cut to {kept:,} tokens",
        card=whole.teacher.path,
    )
    job = replace(find_models(recipe, base, teacher=teacher), text=whole.text)
    return job, do(plan_data(job))


def vocabulary(job: Job, data: Stage) -> StagePlan:
    """The teacher, with the tokens that the recipe keeps and a tokenizer for them."""
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
            trust_remote_code=job.trust_remote_code,
        )
        found = {
            "vocabulary": summary["pruning"]["changed"].get("vocabulary", [job.vocabulary] * 2),
            **_perplexities(job, out / MODEL, windows),
        }
        return Outcome(peak_memory_bytes=peak_memory_bytes(), summary=found)

    inputs = {
        "vocabulary": _named_tokens(section, job.base),
        "teacher": job.teacher.fingerprint,
        "data": data.digest,
    }
    return StagePlan("vocabulary", inputs, work)


def _named_tokens(section: PrunedStudent, base: Path) -> int | str | None:
    """What the recipe keeps; of a file, its content."""
    if not isinstance(section.vocabulary, VocabularyFile):
        return section.vocabulary
    file = base / section.vocabulary.path
    # A missing file has its error where it is read.
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else None


def _perplexities(job: Job, cut: Path, windows: WindowSet) -> dict[str, Any]:
    """Of the whole teacher and the cut one on training text that has lost no token."""
    kept_ids = load_kept_ids(cut)
    assert kept_ids is not None
    new_V = torch.full((max(job.vocabulary, max(kept_ids) + 1),), -1)
    new_V[list(kept_ids)] = torch.arange(len(kept_ids))
    wanted = range(min(len(windows), 1 + MEASURED_TOKENS // len(windows[0]["labels"])))
    rows = [windows[i] for i in wanted if bool((new_V[windows[i]["input_ids"]] >= 0).all())]
    found: dict[str, Any] = {"measured_share": len(rows) / len(wanted)}
    if not rows:
        return found
    dtype = choose_precision(job.recipe.train.precision, default_device()).dtype
    for name, path, of_rows in (
        ("teacher_perplexity", job.teacher.path, rows),
        ("cut_perplexity", cut, [_renumbered(row, new_V) for row in rows]),
    ):
        model = load_model(path, dtype=dtype, trust_remote_code=job.trust_remote_code)
        answers = heldout_answers(model.to(default_device()), of_rows)
        size = model.get_output_embeddings().weight.shape[0]
        found[name] = compare(answers, answers, min(size, job.vocabulary)).perplexity
    return found


def _renumbered(row: dict[str, Tensor], new_V: Tensor) -> dict[str, Tensor]:
    labels_L = row["labels"]
    new_L = torch.where(labels_L >= 0, new_V[labels_L.clamp(min=0)], labels_L)
    return {**row, "input_ids": new_V[row["input_ids"]], "labels": new_L}

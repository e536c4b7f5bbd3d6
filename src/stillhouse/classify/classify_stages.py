"""The stages of a classifier's run: their dependencies, and the work that fills their folders.

`classifier_evaluation` has the evaluation stage, and `classifier_export` the export stages.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stillhouse import account
from stillhouse.classify.classifier import check_classifier
from stillhouse.classify.classifier_students import build_classifier
from stillhouse.classify.classify_config import PretrainedClassifier, RandomClassifier
from stillhouse.classify.classify_job import TaskJob
from stillhouse.classify.fit import MODEL, fit
from stillhouse.classify.label_judgment import CHUNKS, Judgment, label_by_api, score_texts
from stillhouse.classify.task_texts import (
    PARTS,
    UNKNOWN,
    Texts,
    gold_ids,
    labels_sha256,
    prepare_texts,
)
from stillhouse.data.turn_end import turn_end
from stillhouse.generation.request import endpoint_of
from stillhouse.hardware import peak_memory_bytes
from stillhouse.pipeline.stage_plan import Do, unanswered
from stillhouse.progress import note
from stillhouse.runfolder import Outcome, Stage, StagePlan
from stillhouse.shared_work import all_processes
from stillhouse.tasks.task_facts import texts_key
from stillhouse.teachers.load_model import load_tokenizer
from stillhouse.training.checkpoints import CHECKPOINTS


def plan_texts(job: TaskJob) -> StagePlan:
    recipe, base, section = job.recipe, job.base, job.recipe.data

    def work(out: Path) -> Outcome:
        found = prepare_texts(recipe, base)
        found.save(out)
        for text in found.notes:
            note(text)
        return Outcome(
            summary={
                "labels": len(found.labels),
                **{name: len(found.part(name)) for name in PARTS},
                "repeated": found.repeated,
            }
        )

    examples = [example.text for example in recipe.task.examples]
    inputs = {
        **texts_key(section, base, seed=recipe.seed, examples=examples, unread="max_tokens"),
        "labels": recipe.task.labels,
        "labels_file": labels_sha256(recipe.task, base),
    }
    return StagePlan("texts", inputs, work, version=3)


def plan_judgment(job: TaskJob, texts: Stage) -> StagePlan:
    """Let the teacher score every text once. The prior is applied later, so that changing it does
    not require scoring the texts again."""
    recipe = job.recipe
    api = recipe.teacher.api

    def work(out: Path) -> Outcome:
        found = Texts.load(texts.path)
        prompt = job.prompt(found)
        if api is not None:
            judged, summary = label_by_api(recipe, prompt, found, job.journal)
            judged.save(out)
            return Outcome(summary=summary)
        (model, words), processes = job.load_teacher(prompt), all_processes()
        judged, tokens = score_texts(model, words, found, out, processes)
        if processes.leads:
            judged.save(out)
        size = account.count_parameters(model)
        return Outcome(
            tokens=tokens,
            flops=account.forward_flops(size.active, tokens),
            peak_memory_bytes=peak_memory_bytes(),
            summary={"parameters": size.total},
        )

    task = recipe.task.model_dump(mode="json", exclude={"prior", "labels", "labels_path", "kind"})
    teacher: dict[str, Any] = {"precision": recipe.teacher.precision}
    if api is not None:
        teacher = {
            "endpoint": endpoint_of(api.base_url),
            "model": api.model,
            "samples": recipe.teacher.samples,
            "top_logprobs": recipe.teacher.top_logprobs,
            "sampling": recipe.teacher.sampling.model_dump(mode="json"),
        }
    inputs = {
        "task": task,
        "asked": teacher,
        "max_tokens": recipe.data.max_tokens,
        "teacher": job.teacher and job.teacher.fingerprint,
        "texts": texts.digest,
    }
    if job.teacher is not None and recipe.task.chat:
        tokenizer = load_tokenizer(job.teacher)
        end = turn_end(tokenizer)
        if end is not None and end.id != tokenizer.eos_token_id:
            inputs["turn_end"] = end.text
    version = 1 if api is None else 5
    return StagePlan(
        "judgment",
        inputs,
        work,
        version,
        resumable=True,
        together=api is None,
        scratch=(CHUNKS,),
        missing=unanswered,
    )


def plan_classifier(job: TaskJob, texts: Stage) -> StagePlan:
    recipe, section = job.recipe, job.recipe.student
    words = isinstance(section, PretrainedClassifier) and section.head == "words"
    uses_teacher = isinstance(section, RandomClassifier) and section.teacher_embeddings

    def work(out: Path) -> Outcome:
        found = Texts.load(texts.path)
        summary = build_classifier(
            section,
            job.student,
            job.teacher,
            job.prompt(found),
            [row.text for row in found.train],
            max_tokens=recipe.data.max_tokens,
            seed=recipe.seed,
            out=out / MODEL,
        )
        return Outcome(peak_memory_bytes=peak_memory_bytes(), summary=summary)

    task = recipe.task.model_dump(mode="json", exclude={"prior", "labels", "labels_path", "kind"})
    inputs = {
        "recipe": section.model_dump(mode="json"),
        "seed": recipe.seed,
        "max_tokens": recipe.data.max_tokens,
        "model": job.student.fingerprint,
        "teacher": job.teacher.fingerprint if job.teacher and uses_teacher else None,
        "task": task if words else None,
        "texts": texts.digest,
    }
    return StagePlan("student", inputs, work, check=lambda out: check_classifier(out / MODEL))


def plan_classifier_training(
    job: TaskJob, texts: Stage, judged: Stage, student: Stage
) -> StagePlan:
    recipe = job.recipe

    def targets() -> tuple[list[str], Tensor]:
        found = Texts.load(texts.path)
        q_NC = Judgment.load(judged.path).distribution("train", recipe)
        known = (~q_NC.isnan().any(-1)).nonzero().flatten().tolist()
        return [found.train[index].text for index in known], q_NC[known]

    inputs = {
        "prior": recipe.task.prior if recipe.teacher.api is None else None,
        "judgment": judged.digest,
    }
    return _training("train", job, student, texts, inputs, targets)


def with_gold(job: TaskJob, stages: Mapping[str, Stage], _do: Do) -> TaskJob:
    """Set `has_gold`: whether there are enough reference labels to train on."""
    found = Texts.load(stages["texts"].path)
    return replace(job, has_gold=gold_ids(found.train, list(found.labels)) is not None)


def plan_gold_training(job: TaskJob, texts: Stage, student: Stage) -> StagePlan:
    """Train the same student on the same texts, as far as they have reference labels."""
    found = Texts.load(texts.path)
    gold_N = gold_ids(found.train, list(found.labels))
    assert gold_N is not None

    def targets() -> tuple[list[str], Tensor]:
        known = (gold_N != UNKNOWN).nonzero().flatten().tolist()
        truth_NC = torch.nn.functional.one_hot(gold_N[known], len(found.labels))
        return [found.train[index].text for index in known], truth_NC.float()

    return _training("baseline", job, student, texts, {}, targets)


def _training(
    name: str, job: TaskJob, student: Stage, texts: Stage, inputs: dict[str, Any], targets: Any
) -> StagePlan:
    section, seed = job.recipe.train, job.recipe.seed

    def work(out: Path) -> Outcome:
        learned, target_NC = targets()
        result = fit(student.path / MODEL, learned, target_NC, section=section, seed=seed, out=out)
        parameters = student.summary["parameters"]
        return Outcome(
            tokens=result.tokens,
            flops=account.training_flops(parameters, result.tokens),
            peak_memory_bytes=result.peak_memory_bytes,
            seconds=result.seconds,
            summary=asdict(result),
        )

    everything = {
        **inputs,
        "recipe": section.model_dump(mode="json"),
        "seed": seed,
        "texts": texts.digest,
        "student": student.digest,
    }
    return StagePlan(
        name,
        everything,
        work,
        resumable=True,
        together=True,
        scratch=(CHECKPOINTS,),
        check=lambda out: check_classifier(out / MODEL),
    )

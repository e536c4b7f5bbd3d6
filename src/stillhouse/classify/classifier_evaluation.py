"""The stage that compares a classifier with its teacher and chooses when it abstains."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from stillhouse.classify.classifier import Classifier, load_classifier
from stillhouse.classify.classify_config import ClassifyRecipe
from stillhouse.classify.classify_job import TaskJob
from stillhouse.classify.fit import MODEL
from stillhouse.classify.label_judgment import Judgment, time_teacher
from stillhouse.classify.task_texts import UNKNOWN, Part, Texts, gold_ids
from stillhouse.evaluation.classification import answered, choose_threshold, coverage_curve, measure
from stillhouse.evaluation.classification_results import (
    Abstention,
    ClassificationEvaluation,
    ClassifierResult,
)
from stillhouse.evaluation.results import EVALUATION
from stillhouse.hardware import choose_precision, cores_of, peak_memory_bytes
from stillhouse.runfolder import Outcome, Stage, StagePlan
from stillhouse.shared_work import Processes, all_processes
from stillhouse.tasks.labeled_texts import LabeledText

Labeled = tuple[Mapping[Part, Tensor], Mapping[str, Any]]
"""A classifier's probabilities [N, C] for the texts of each part, and its size."""

_SPEED_SECONDS, _ROUNDS = 1.0, 2


def plan_classifier_evaluation(
    job: TaskJob, texts: Stage, judged: Stage, student: Stage, trained: Stage, tuned: Stage | None
) -> StagePlan:
    def work(out: Path) -> Outcome:
        folders = {"untrained": student.path / MODEL, "student": trained.path / MODEL}
        if tuned is not None:
            folders["fine_tuned"] = tuned.path / MODEL
        found, processes = Texts.load(texts.path), all_processes()
        labeled = {
            role: _label(folder, found, job.recipe, processes, abstains=role == "student")
            for role, folder in folders.items()
        }
        if processes.leads:
            with cores_of(1):
                measured = _evaluate(job, found, judged, labeled, folders["student"])
            measured.save(out / EVALUATION)
        return Outcome(peak_memory_bytes=peak_memory_bytes())

    inputs = {
        "recipe": job.recipe.evaluate.model_dump(mode="json"),
        "precision": job.recipe.train.precision,
        "judgment": judged.digest,
        "prior": job.recipe.task.prior,
        "texts": texts.digest,
        "student": student.digest,
        "trained": trained.digest,
        "baseline": tuned and tuned.digest,
    }
    return StagePlan("evaluate", inputs, work, version=4, together=True)


def _label(
    folder: Path, found: Texts, recipe: ClassifyRecipe, processes: Processes, *, abstains: bool
) -> Labeled:
    """Label the texts, of which each process does a share. abstains: also label the texts on which
    the threshold is chosen."""
    classifier = _loaded(folder, recipe)
    parts: tuple[Part, ...] = ("test", "calibration") if abstains else ("test",)
    p = {
        part: classifier.probabilities([row.text for row in found.part(part)], processes)
        for part in parts
    }
    files = folder.glob("*.safetensors")
    return p, {
        "parameters": sum(parameter.numel() for parameter in classifier.model.parameters()),
        "bytes_on_disk": sum(file.stat().st_size for file in files),
    }


def _evaluate(
    job: TaskJob, found: Texts, judged: Stage, labeled: Mapping[str, Labeled], student: Path
) -> ClassificationEvaluation:
    recipe, labels = job.recipe, list(found.labels)
    scores = Judgment.load(judged.path)
    measured: tuple[Part, ...] = ("calibration", "test")
    teacher = {part: scores.distribution(part, recipe) for part in measured}
    rows = {part: found.part(part) for part in measured}
    notes = _notes(job, found, judged, int(teacher["test"].isnan().any(-1).sum()))
    notes += _gold_notes(rows["test"], found.train if "fine_tuned" in labeled else [])
    gold = {part: gold_ids(rows[part], labels) for part in measured}
    sample = [row.text for row in rows["test"][: recipe.evaluate.speed_texts]]
    teacher_facts: dict[str, Any] = {}
    if job.teacher is not None:
        teacher_facts["parameters"] = judged.summary["parameters"]
    results = []
    for role, (p, size) in labeled.items():
        facts = dict(size)
        if role == "student":
            rates = _rates(job, found, _loaded(student, recipe), sample)
            teacher_facts["texts_per_s"], facts["texts_per_s"] = rates
        result = measure(role, p["test"], teacher["test"], gold["test"])
        results.append(ClassifierResult(**{**asdict(result), **facts}))
    own = asdict(measure("teacher", teacher["test"], teacher["test"], gold["test"]))
    results.insert(0, ClassifierResult(**{**own, **teacher_facts}))
    abstention, curve = _abstention(recipe, labeled["student"][0], teacher, gold, notes)
    return ClassificationEvaluation(labels, len(rows["test"]), results, abstention, curve, notes)


def _loaded(folder: Path, recipe: ClassifyRecipe) -> Classifier:
    dtype = choose_precision(recipe.train.precision).dtype
    return load_classifier(folder, dtype=dtype)


def _rates(
    job: TaskJob, found: Texts, student: Classifier, sample: list[str]
) -> tuple[float | None, float]:
    """Texts per second of the teacher (None for an API) and the student.

    Each is the best of several alternating rounds, so that other load on the machine affects both.
    """
    loaded = None if job.teacher is None else job.load_teacher(job.prompt(found))
    teacher, ours = [], []
    if loaded is not None:
        time_teacher(*loaded, sample[:4])  # the first pass is slower
    for _ in range(_ROUNDS):
        if loaded is not None:
            teacher.append(time_teacher(*loaded, sample))
        ours.append(_time_student(student, sample))
    return max(teacher, default=None), max(ours)


def _time_student(classifier: Classifier, sample: list[str]) -> float:
    """Texts per second over as many rounds as fit in a second."""
    classifier.probabilities(sample[:4])
    began, rounds = time.perf_counter(), 0
    while rounds == 0 or time.perf_counter() - began < _SPEED_SECONDS:
        classifier.probabilities(sample)
        rounds += 1
    return rounds * len(sample) / (time.perf_counter() - began)


def _notes(job: TaskJob, found: Texts, judged: Stage, unknown: int) -> list[str]:
    notes = []
    if found.repeated:
        notes.append(f"{found.repeated:,} duplicate texts were left out.")
    if job.teacher is None:
        answers = judged.summary["answers"]
        notes.append(
            f"The teacher returned {answers.get('label', 0):,} labels; "
            f"{answers.get('outside', 0):,} answers were not a label, and "
            f"{answers.get('none', 0):,} requests had no answer. {unknown:,} test texts have no "
            "label from the teacher: they are excluded from metrics against the teacher, and count "
            "as wrong in its accuracy."
        )
        if job.recipe.teacher.top_logprobs is not None:
            notes.append(
                "The teacher's distribution is over first tokens: labels that are not among the "
                f"{job.recipe.teacher.top_logprobs} most likely have probability 0."
            )
    return notes


def _gold_notes(test: list[LabeledText], tuned_on: list[LabeledText]) -> list[str]:
    """Notes on how many texts have reference labels, if only some do."""
    notes = []
    for rows, use in (
        (test, "test texts have reference labels: metrics against labels use only these."),
        (tuned_on, "training texts have reference labels: the fine-tuned student uses only these."),
    ):
        known = sum(row.gold is not None for row in rows)
        if 0 < known < len(rows):
            notes.append(f"{known:,} of {len(rows):,} {use}")
    return notes


def _abstention(
    recipe: ClassifyRecipe,
    p: Mapping[Part, Tensor],
    teacher: Mapping[Part, Tensor],
    gold: Mapping[Part, Tensor | None],
    notes: list[str],
) -> tuple[Abstention, list[tuple[float, float]]]:
    section = recipe.evaluate.abstain
    measured: str = section.measure
    if measured == "accuracy" and (gold["calibration"] is None or gold["test"] is None):
        notes.append("There are no reference labels, so the threshold is chosen for agreement.")
        measured = "agreement"
    on: dict[Part, tuple[Tensor, Tensor]] = {}
    for part, q_NC in teacher.items():
        gold_N = gold[part]
        if measured == "agreement" or gold_N is None:
            truth_N, known_N = q_NC.argmax(-1), ~q_NC.isnan().any(-1)
        else:
            truth_N, known_N = gold_N, gold_N != UNKNOWN
        on[part] = p[part][known_N], truth_N[known_N]
    threshold = choose_threshold(*on["calibration"], section.target, section.confidence)
    coverage, reached = answered(*on["calibration"], threshold)
    test_coverage, test_reached = answered(*on["test"], threshold)
    chosen = Abstention(
        measure=measured,
        wanted=section.target,
        sureness=section.confidence,
        threshold=threshold,
        coverage=coverage,
        reached=reached,
        test_coverage=test_coverage,
        test_reached=test_reached,
    )
    return chosen, coverage_curve(*on["test"])

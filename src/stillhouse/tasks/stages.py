"""The stages of a classifier's run: what each depends on, and the work that fills its folder."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stillhouse import account
from stillhouse.errors import ModelError
from stillhouse.evaluate.classification import (
    Abstention,
    ClassificationEvaluation,
    ClassifierResult,
    answered,
    choose_threshold,
    coverage_curve,
    measure,
)
from stillhouse.hardware import choose_precision, default_device, machine, peak_memory_bytes
from stillhouse.recipe import ClassifyRecipe
from stillhouse.recipe.classify import PretrainedClassifier, RandomClassifier
from stillhouse.report.classifier import ClassifierReport, write_classifier_report
from stillhouse.report.data import StageCost
from stillhouse.runfolder import Outcome, Stage, versions
from stillhouse.stages import StagePlan
from stillhouse.synthesis.request import endpoint_of
from stillhouse.tasks.card import write_card
from stillhouse.tasks.classifier import Classifier, Facts, load_classifier
from stillhouse.tasks.fit import CHECKPOINTS, METRICS, MODEL, fit
from stillhouse.tasks.judge import CHUNKS, Judgment, ask_api, score_texts, time_teacher
from stillhouse.tasks.onnx import ship_onnx
from stillhouse.tasks.prompts import LabelPrompt
from stillhouse.tasks.students import build_classifier
from stillhouse.tasks.texts import LabelledText, Part, Texts, files_sha256, gold_ids, prepare_texts
from stillhouse.teachers import ModelSource, load_model, load_tokenizer
from stillhouse.training import read_metrics

EVALUATION = "evaluation.json"
REPORT, REPORT_DATA = "report.html", "report.json"
REPLAY_LIMIT = 1e-4
"""What a probability may differ by after a checkpoint is written and read."""
_SPEED_SECONDS = 1.0


@dataclass(frozen=True)
class TaskJob:
    """base: where relative paths start. teacher: None for an API. journal: of an API's answers."""

    recipe: ClassifyRecipe
    base: Path
    teacher: ModelSource | None
    student: ModelSource
    journal: Path

    @property
    def described(self) -> str:
        api = self.recipe.teacher.api
        if api is not None:
            return f"{api.model} at {endpoint_of(api.base_url)}"
        assert self.teacher is not None
        return self.teacher.described

    def load_teacher(self) -> tuple[Any, Any]:
        """Model and tokenizer, in the recipe's precision."""
        assert self.teacher is not None
        section, device = self.recipe.teacher, default_device()
        dtype = choose_precision(section.precision, device).dtype
        code = section.trust_remote_code
        model = load_model(self.teacher.path, dtype=dtype, trust_remote_code=code)
        return model.to(device), load_tokenizer(self.teacher.path, trust_remote_code=code)

    def prompt(self, texts: Texts) -> LabelPrompt:
        return LabelPrompt.of(self.recipe.task, texts.labels)


def texts(recipe: ClassifyRecipe, base: Path) -> StagePlan:
    section = recipe.data

    def work(out: Path) -> Outcome:
        found = prepare_texts(recipe, base)
        found.save(out)
        return Outcome(
            summary={
                "labels": len(found.labels),
                "train": len(found.train),
                "calibration": len(found.calibration),
                "test": len(found.test),
                "repeated": found.repeated,
            }
        )

    labels_file = recipe.task.labels_path
    inputs = {
        "recipe": section.model_dump(mode="json", exclude={"max_tokens"}),
        "labels": recipe.task.labels,
        "labels_file": labels_file and (base / labels_file).read_text(encoding="utf-8"),
        "files": files_sha256([*section.texts, *section.test], base),
        "seed": recipe.seed,
    }
    return StagePlan("texts", inputs, work)


def judgment(job: TaskJob, texts: Stage) -> StagePlan:
    """The teacher sees every text, once. What is made of its scores comes later, so that another
    prior asks nothing again."""
    recipe = job.recipe
    api = recipe.teacher.api

    def work(out: Path) -> Outcome:
        found = Texts.load(texts.path)
        prompt = job.prompt(found)
        if api is not None:
            judged, counts = ask_api(recipe, prompt, found, out, job.journal)
            judged.save(out)
            return Outcome(summary={"answers": counts})
        model, tokenizer = job.load_teacher()
        judged, tokens = score_texts(model, tokenizer, prompt, found, recipe.data.max_tokens, out)
        judged.save(out)
        size = account.count_parameters(model)
        return Outcome(
            tokens=tokens,
            flops=account.forward_flops(size.head_once, tokens),
            peak_memory_bytes=peak_memory_bytes(),
            summary={"parameters": size.total},
        )

    task = recipe.task.model_dump(mode="json", exclude={"prior", "labels", "labels_path", "kind"})
    asked: dict[str, Any] = {"precision": recipe.teacher.precision}
    if api is not None:
        asked = {
            "endpoint": endpoint_of(api.base_url),
            "model": api.model,
            "samples": recipe.teacher.samples,
            "top_logprobs": recipe.teacher.top_logprobs,
        }
    inputs = {
        "task": task,
        "asked": asked,
        "max_tokens": recipe.data.max_tokens,
        "teacher": job.teacher and job.teacher.fingerprint,
        "texts": texts.digest,
    }
    return StagePlan("judgment", inputs, work, resumable=True, scratch=(CHUNKS,))


def student(job: TaskJob, texts: Stage) -> StagePlan:
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
    return StagePlan("student", inputs, work)


def training(job: TaskJob, texts: Stage, judged: Stage, student: Stage) -> StagePlan:
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


def baseline(job: TaskJob, texts: Stage, student: Stage) -> StagePlan | None:
    """The same student trained on the true labels of the same texts; None where they lack."""
    found = Texts.load(texts.path)
    gold = gold_ids(found.train, list(found.labels))
    if gold is None or not job.recipe.evaluate.fine_tuning_baseline:
        return None

    def targets() -> tuple[list[str], Tensor]:
        truth_NC = torch.nn.functional.one_hot(torch.tensor(gold), len(found.labels))
        return [row.text for row in found.train], truth_NC.float()

    return _training("baseline", job, student, texts, {}, targets)


def _training(
    name: str, job: TaskJob, student: Stage, texts: Stage, inputs: dict[str, Any], targets: Any
) -> StagePlan:
    section, seed = job.recipe.train, job.recipe.seed

    def work(out: Path) -> Outcome:
        learnt, target_NC = targets()
        result = fit(student.path / MODEL, learnt, target_NC, section=section, seed=seed, out=out)
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
    return StagePlan(name, everything, work, resumable=True, scratch=(CHECKPOINTS,))


# --- evaluation ------------------------------------------------------------------------------


def evaluation(
    job: TaskJob, texts: Stage, judged: Stage, student: Stage, trained: Stage, tuned: Stage | None
) -> StagePlan:
    def work(out: Path) -> Outcome:
        folders = {"untrained": student.path / MODEL, "student": trained.path / MODEL}
        if tuned is not None:
            folders["fine_tuned"] = tuned.path / MODEL
        found = _evaluate(job, Texts.load(texts.path), judged, folders)
        found.save(out / EVALUATION)
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
    return StagePlan("evaluate", inputs, work)


def _evaluate(
    job: TaskJob, found: Texts, judged: Stage, folders: dict[str, Path]
) -> ClassificationEvaluation:
    recipe, labels = job.recipe, list(found.labels)
    scores = Judgment.load(judged.path)
    measured: tuple[Part, ...] = ("calibration", "test")
    teacher = {part: scores.distribution(part, recipe) for part in measured}
    known = {part: ~q_NC.isnan().any(-1) for part, q_NC in teacher.items()}
    notes = _notes(job, found, judged, int((~known["test"]).sum()))
    rows = {part: _only(found.part(part), known[part]) for part in measured}
    gold = {part: _gold(rows[part], labels) for part in measured}
    shown = {part: [row.text for row in rows[part]] for part in measured}
    taught = {part: q_NC[known[part]] for part, q_NC in teacher.items()}
    sample = shown["test"][: recipe.evaluate.speed_texts]
    results = [_teacher_result(job, found, taught["test"], gold["test"], judged, sample)]
    p: dict[str, Tensor] = {}
    for role, folder in folders.items():
        classifier = _loaded(folder, recipe)
        p_NC = classifier.probabilities(shown["test"])
        facts = _facts_of(classifier, folder)
        if role == "student":
            p = {"test": p_NC, "calibration": classifier.probabilities(shown["calibration"])}
            facts["texts_per_s"] = _time_student(classifier, sample)
        result = measure(role, p_NC, taught["test"], gold["test"])
        results.append(ClassifierResult(**{**asdict(result), **facts}))
    abstention, curve = _abstention(recipe, p, taught, gold, notes)
    return ClassificationEvaluation(labels, len(shown["test"]), results, abstention, curve, notes)


def _only(rows: list[LabelledText], known_N: Tensor) -> list[LabelledText]:
    return [row for row, known in zip(rows, known_N.tolist(), strict=True) if known]


def _gold(rows: list[LabelledText], labels: list[str]) -> Tensor | None:
    ids = gold_ids(rows, labels)
    return None if ids is None else torch.tensor(ids)


def _loaded(folder: Path, recipe: ClassifyRecipe) -> Classifier:
    dtype = choose_precision(recipe.train.precision, default_device()).dtype
    return load_classifier(folder, dtype=dtype)


def _facts_of(classifier: Classifier, folder: Path) -> dict[str, Any]:
    files = folder.glob("*.safetensors")
    return {
        "parameters": sum(parameter.numel() for parameter in classifier.model.parameters()),
        "bytes_on_disk": sum(file.stat().st_size for file in files),
    }


def _teacher_result(
    job: TaskJob,
    found: Texts,
    q_NC: Tensor,
    gold_N: Tensor | None,
    judged: Stage,
    sample: list[str],
) -> ClassifierResult:
    facts: dict[str, Any] = {}
    if job.teacher is not None:
        model, tokenizer = job.load_teacher()
        most = job.recipe.data.max_tokens
        prompt = job.prompt(found)
        time_teacher(model, tokenizer, prompt, sample[:4], most)  # the first pass is slower
        facts["texts_per_s"] = time_teacher(model, tokenizer, prompt, sample, most)
        facts["parameters"] = judged.summary["parameters"]
    return ClassifierResult(**{**asdict(measure("teacher", q_NC, q_NC, gold_N)), **facts})


def _time_student(classifier: Classifier, sample: list[str]) -> float:
    """Texts a second over as many rounds as a second holds."""
    classifier.probabilities(sample[:4])
    began, rounds = time.perf_counter(), 0
    while rounds == 0 or time.perf_counter() - began < _SPEED_SECONDS:
        classifier.probabilities(sample)
        rounds += 1
    return rounds * len(sample) / (time.perf_counter() - began)


def _notes(job: TaskJob, found: Texts, judged: Stage, unknown: int) -> list[str]:
    notes = []
    if found.repeated:
        notes.append(f"{found.repeated:,} texts stood more than once and were used once.")
    if job.teacher is None:
        answers = judged.summary["answers"]
        notes.append(
            f"The teacher gave {answers.get('label', 0):,} labels; {answers.get('outside', 0):,} "
            f"answers were none of them, and {answers.get('none', 0):,} requests had no answer. "
            f"Of the test texts, {unknown:,} are left out for that reason."
        )
        if job.recipe.teacher.top_logprobs is not None:
            notes.append(
                f"The teacher's distribution is that of its first token: labels below the "
                f"{job.recipe.teacher.top_logprobs} likeliest got nothing, and labels that begin "
                "alike share alike."
            )
    return notes


def _abstention(
    recipe: ClassifyRecipe,
    p: Mapping[str, Tensor],
    taught: Mapping[Part, Tensor],
    gold: Mapping[Part, Tensor | None],
    notes: list[str],
) -> tuple[Abstention, list[tuple[float, float]]]:
    section = recipe.evaluate.abstain
    measured: str = section.measure
    if measured == "accuracy" and (gold["calibration"] is None or gold["test"] is None):
        notes.append("The true labels are not known: the threshold is for agreement.")
        measured = "agreement"
    truth = {}
    for part, q_NC in taught.items():
        known_N = gold[part]
        truth[part] = q_NC.argmax(-1) if measured == "agreement" or known_N is None else known_N
    threshold = choose_threshold(p["calibration"], truth["calibration"], section.wanted)
    coverage, reached = answered(p["calibration"], truth["calibration"], threshold)
    test_coverage, test_reached = answered(p["test"], truth["test"], threshold)
    chosen = Abstention(
        measured, section.wanted, threshold, coverage, reached, test_coverage, test_reached
    )
    return chosen, coverage_curve(p["test"], truth["test"])


# --- products ----------------------------------------------------------------------------------


def export(job: TaskJob, texts: Stage, trained: Stage, evaluated: Stage) -> StagePlan:
    """The trained folder with its threshold and card; read again, it must say the same."""

    def work(out: Path) -> Outcome:
        found = ClassificationEvaluation.load(evaluated.path / EVALUATION)
        folder = out / MODEL
        shutil.copytree(trained.path / MODEL, folder)
        facts = asdict(Facts.load(folder)) | {"threshold": found.abstention.threshold}
        Facts(**facts).save(folder)
        write_card(folder, job.recipe, job.described, found)
        rows = [row.text for row in Texts.load(texts.path).calibration]
        before = load_classifier(trained.path / MODEL).probabilities(rows)
        difference = float((load_classifier(folder).probabilities(rows) - before).abs().max())
        if not difference <= REPLAY_LIMIT:
            raise ModelError(
                f"the exported classifier's probabilities differ by {difference:.2g}",
                where=folder,
                fix="the disk may be damaged: give the same command again",
            )
        replays = ship_onnx(job.recipe.export, folder, rows, out)
        return Outcome(summary={"difference": difference, "replays": replays})

    inputs = {
        "name": job.recipe.name,
        "trained": trained.digest,
        "evaluated": evaluated.digest,
        "texts": texts.digest,
        "teacher": job.described,
        "recipe": job.recipe.export.model_dump(mode="json", exclude={"push_to_hub"}),
    }
    return StagePlan("export", inputs, work)


def report(job: TaskJob, finished: list[Stage]) -> StagePlan:
    stages = {stage.name: stage for stage in finished}

    def work(out: Path) -> Outcome:
        data = ClassifierReport(
            title=job.recipe.name,
            created=time.strftime("%Y-%m-%d %H:%M"),
            teacher=job.described,
            evaluation=ClassificationEvaluation.load(stages["evaluate"].path / EVALUATION),
            parts={name: stages["texts"].summary[name] for name in PARTS_SHOWN},
            metrics=read_metrics(stages["train"].path / METRICS),
            stages=[StageCost.of(stage) for stage in finished],
            recipe=job.recipe.model_dump(mode="json"),
            machine=machine(),
            versions=versions(),
            replays=stages["export"].summary["replays"],
        )
        (out / REPORT_DATA).write_text(data.to_json(), encoding="utf-8")
        write_classifier_report(data, out / REPORT)
        return Outcome()

    inputs = {
        "recipe": job.recipe.model_dump(mode="json"),
        "stages": {name: stage.digest for name, stage in stages.items()},
    }
    return StagePlan("report", inputs, work)


PARTS_SHOWN = ("train", "calibration", "test")

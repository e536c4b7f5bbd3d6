"""The final stages of a classifier's run: export its folder, verify it in a process that uses only
transformers, and write the report."""

from __future__ import annotations

import shutil
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from stillhouse.classify.classifier import Classifier, Facts, load_classifier
from stillhouse.classify.classifier_card import (
    classifier_card,
    write_checkpoint_card,
    write_onnx_card,
)
from stillhouse.classify.classify_job import TaskJob
from stillhouse.classify.fit import MODEL
from stillhouse.classify.label_prompts import cut
from stillhouse.classify.label_scoring import batches_by_length
from stillhouse.classify.task_texts import Texts
from stillhouse.errors import ModelError
from stillhouse.evaluation.classification_results import ClassificationEvaluation
from stillhouse.evaluation.results import EVALUATION
from stillhouse.export.classifier_gate import ClassifierRows, replay_classifier
from stillhouse.export.export_config import ClassifierExportRecipe
from stillhouse.export.onnx_export import export_onnx
from stillhouse.pipeline.report_stage import plan_report
from stillhouse.progress import note
from stillhouse.report.classifier_report import classifier_report
from stillhouse.report.page import Report
from stillhouse.report.sections import RunFacts
from stillhouse.runfolder import Outcome, Stage, StagePlan
from stillhouse.teachers.older_names import write_older_names
from stillhouse.training.checkpoints import METRICS, read_metrics

KEPT = ("*.json", "*.jinja", "*.txt")
"""Files of the checkpoint that are copied next to the ONNX file: configuration and tokenizer."""


def ship_onnx(
    section: ClassifierExportRecipe, model: Path, texts: list[str], out: Path
) -> list[dict[str, Any]]:
    """Export each ONNX format of the recipe to `out`/FORMAT, and replay it on `texts`.

    model: the checkpoint's folder. Returns the replays, with the file's speed and the checkpoint's
    in the same batches on the same CPU. Raises ModelError if an export fails.
    """
    forms = [form for form in section.formats if form != "safetensors"]
    if not forms:
        return []
    classifier = load_classifier(model)
    classifier.model.to("cpu")
    rows = classifier.tokens(texts)
    groups = [[rows[index] for index in chosen] for chosen in batches_by_length([*map(len, rows)])]
    with torch.inference_mode():
        classifier.logits(groups[0])  # the first pass allocates memory
        began = time.perf_counter()
        expected_NC = torch.cat([classifier.logits(group).softmax(-1) for group in groups])
        rate = len(rows) / (time.perf_counter() - began)
    replays = []
    for form in forms:
        folder = out / form
        replay = export_onnx(
            classifier.model,
            groups,
            classifier.tokenizer.pad_token_id or 0,
            expected_NC,
            folder,
            form=form,
            source=model,
            read=classifier.head_logits,
            kl_limit=section.kl_limit,
        )
        for pattern in KEPT:
            for file in model.glob(pattern):
                shutil.copy(file, folder / file.name)
        replays.append({**asdict(replay), "checkpoint_texts_per_s": rate})
    return replays


REPLAY_LIMIT = 1e-4
"""Maximum difference in a probability after a checkpoint is saved and loaded by transformers alone.
"""
REPLAY_PASSES = 128
"""Number of passes in a replay: texts, or, for a language model, texts times labels."""


def plan_classifier_export(
    job: TaskJob, texts: Stage, trained: Stage, evaluated: Stage
) -> StagePlan:
    """Export the trained folder with its threshold, and ONNX files, each with its card. Reloaded,
    they must produce the same results."""

    def work(out: Path) -> Outcome:
        found = ClassificationEvaluation.load(evaluated.path / EVALUATION)
        folder = out / MODEL
        shutil.copytree(trained.path / MODEL, folder)
        write_older_names(folder)
        facts = asdict(Facts.load(folder)) | {"threshold": found.abstention.threshold}
        Facts(**facts).save(folder)
        rows = [row.text for row in Texts.load(texts.path).calibration]
        difference = _replay(load_classifier(trained.path / MODEL), folder, rows)
        replays = ship_onnx(job.recipe.export, folder, rows, out)
        card = classifier_card(job, texts, trained, found)
        write_checkpoint_card(folder, card, difference)
        for replay in replays:
            write_onnx_card(out / replay["format"], card, replay)
        return Outcome(summary={"difference": difference, "replays": replays})

    inputs = {
        "name": job.recipe.name,
        "trained": trained.digest,
        "evaluated": evaluated.digest,
        "texts": texts.digest,
        "teacher": job.described,
        "origins": [asdict(one) for one in job.made_with],
        "recipe": job.recipe.export.model_dump(mode="json", exclude={"push_to_hub"}),
    }
    return StagePlan("export", inputs, work, version=4)


def _replay(source: Classifier, exported: Path, texts: list[str]) -> float:
    """Load the folder with transformers alone, and return the maximum difference between a
    probability and the source's on some texts. Raises ModelError if it fails or is too large."""
    labels = None if source.words is None else source.words.labels
    texts = texts[: max(1, REPLAY_PASSES // len(labels or [0]))]
    rows, facts, most = source.tokens(texts), source.facts, source.facts.max_tokens
    untruncated = [
        text if len(row) < most and cut(text, source.tokenizer, most) == text else None
        for text, row in zip(texts, rows, strict=True)
    ]
    inputs = ClassifierRows(rows, untruncated, facts.mean_pooling, labels, facts.prior)
    note("Replaying the exported classifier in a fresh process")
    replayed_NC = replay_classifier(exported, inputs)
    difference = float((replayed_NC - source.probabilities(texts)).abs().max())
    if not difference <= REPLAY_LIMIT:  # NaN fails too
        raise ModelError(
            f"the exported classifier's probabilities differ by {difference:.2g}",
            where=exported,
            fix="run the same command again; if it fails again, check the disk",
        )
    return difference


def plan_classifier_report(job: TaskJob, stages: dict[str, Stage]) -> StagePlan:
    def collect() -> Report:
        return classifier_report(
            RunFacts.gather(job.recipe, job.described, stages.values()),
            evaluation=ClassificationEvaluation.load(stages["evaluate"].path / EVALUATION),
            parts=stages["texts"].summary,
            judgment=stages["judgment"].summary,
            history=read_metrics(stages["train"].path / METRICS),
            replays=stages["export"].summary["replays"],
        )

    return plan_report(job.recipe, stages, collect, version=3)

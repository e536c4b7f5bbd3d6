"""The final stages of a classifier's run: export its folder with model cards, verify it in a
process that uses only transformers, and write the report."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from stillhouse.classify.classifier import Classifier, Facts, load_classifier
from stillhouse.classify.classify_job import TaskJob
from stillhouse.classify.fit import MODEL
from stillhouse.classify.label_prompts import cut
from stillhouse.classify.label_scoring import batches_by_length
from stillhouse.classify.task_texts import Texts
from stillhouse.errors import ModelError
from stillhouse.evaluation.classification_results import ClassificationEvaluation
from stillhouse.evaluation.metrics import metrics_of
from stillhouse.evaluation.results import EVALUATION
from stillhouse.export.classifier_gate import ClassifierRows, replay_classifier
from stillhouse.export.export_config import ClassifierExportRecipe
from stillhouse.export.model_card import ModelCard, write_card
from stillhouse.export.onnx_export import export_onnx
from stillhouse.number_format import percent, size, tiny
from stillhouse.pipeline.report_stage import plan_report
from stillhouse.progress import note
from stillhouse.report.classifier_report import classifier_report
from stillhouse.report.page import Report
from stillhouse.report.sections import RunFacts
from stillhouse.runfolder import Outcome, Stage, StagePlan
from stillhouse.section import recipe_yaml
from stillhouse.tasks.task_facts import card_hashes, text_files
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


# --- model cards ----------------------------------------------------------------------------------

_USE = (
    "`stillhouse predict FOLDER texts.jsonl` writes a label, probabilities, and whether to abstain "
    "for each text."
)
_POOLED = (
    "The head reads the mean of the last hidden states, but the `forward` of transformers' class "
    "reads only the last token: use Stillhouse, or call `model.score(mean)` yourself."
)
_ONNX = (
    "`model.onnx` is for onnxruntime: `input_ids` and `attention_mask` in, `logits` out, one for "
    f"each label in the order above. The tokenizer is next to it; `{Facts.FILE}` has the maximum "
    "number of tokens in training and the threshold below which the classifier abstains."
)
_INT8 = "Weights of matrix products are quantized to 8 bits, their inputs dynamically."


def classifier_card(
    job: TaskJob, texts: Stage, trained: Stage, found: ClassificationEvaluation
) -> ModelCard:
    recipe, parts = job.recipe, texts.summary
    facts = Facts.load(trained.path / MODEL)
    made_of = {"student's start": job.student.fingerprint, "checkpoint": trained.digest}
    return ModelCard(
        name=recipe.name,
        pipeline="text-classification",
        origins=job.made_with,
        about=[
            f"A classifier of {len(found.labels)} labels, distilled from {job.described} with "
            "Stillhouse.",
            f"Labels: {', '.join(found.labels)}.",
        ],
        metrics=metrics_of(found),
        data=f"{parts['train']:,} training texts, {parts['calibration']:,} for the threshold and "
        f"{parts['test']:,} test texts, from {text_files(recipe.data)}",
        recipe=recipe_yaml(recipe),
        hashes=card_hashes(job.teacher, texts, **made_of),
        limits=[
            f"It reads at most the first {facts.max_tokens:,} tokens of a text.",
            "It always returns a label, even if none fits the text: use the threshold.",
        ],
    )


def write_checkpoint_card(folder: Path, card: ModelCard, difference: float) -> None:
    """Write a checkpoint's card. difference: maximum difference between a probability and the
    trained checkpoint's."""
    use = f"{_USE}\n\n{_POOLED}" if Facts.load(folder).mean_pooling else _USE
    replay = (
        "Loaded by a process that imports only transformers, its probabilities differ from the "
        f"trained checkpoint's by at most {difference:.2g}."
    )
    write_card(folder, card, library="transformers", use=use, replay=replay)


def write_onnx_card(folder: Path, card: ModelCard, replay: Mapping[str, Any]) -> None:
    """Write an ONNX file's card. replay: the result of `ship_onnx` for this format."""
    use = f"{_ONNX} {_INT8}" if replay["format"] == "onnx-int8" else _ONNX
    sentence = (
        f"The table is the checkpoint's. In onnxruntime this file ({replay['format']}, "
        f"{size(replay['bytes'])}) differs from it by {tiny(max(0.0, replay['kl']))} nats/text "
        f"and returns the same top-1 label for {percent(replay['top1_agreement'], 1)} of "
        f"{replay['texts']:,} texts."
    )
    write_card(folder, card, library="onnx", use=use, replay=sentence)

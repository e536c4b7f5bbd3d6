"""A classifier's model cards, one beside each format."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stillhouse.classify.classifier import Facts
from stillhouse.classify.classify_job import TaskJob
from stillhouse.evaluate.classification import ClassificationEvaluation
from stillhouse.export.task_card import TaskCard, write_task_card
from stillhouse.report.classifier_page import abstention_sentence, measures
from stillhouse.report.palette import role_name
from stillhouse.runfolder import Stage
from stillhouse.section import recipe_yaml

_USE = (
    "`stillhouse predict FOLDER texts.jsonl` writes a label, probabilities and whether to abstain "
    "for each text."
)
_POOLED = (
    "The head reads the mean of the last hidden states. The `forward` of transformers' own class "
    "would read the last token alone: use Stillhouse, or `model.score(mean)` yourself."
)
_ONNX = (
    "`model.onnx` is for onnxruntime: `input_ids` and `attention_mask` in, `logits` out, one for "
    "each label in the order above. The tokenizer lies beside it, and in `classifier.json` the "
    "most tokens that it was trained on and the threshold below which it would rather say nothing."
)
_INT8 = "The weights of its products are rounded to 8 bits, and their inputs while it runs."


def classifier_card(
    job: TaskJob, texts: Stage, trained: Stage, found: ClassificationEvaluation
) -> TaskCard:
    recipe, parts = job.recipe, texts.summary
    files = ", ".join(file.path for file in [*recipe.data.texts, *recipe.data.test])
    hashes = {"texts": texts.digest, "student's start": job.student.fingerprint}
    if job.teacher is not None:
        hashes = {"teacher": job.teacher.fingerprint, **hashes}
    return TaskCard(
        name=recipe.name,
        pipeline="text-classification",
        origins=job.made_with,
        about=[
            f"A classifier of {len(found.labels)} labels, distilled from {job.described} with "
            "Stillhouse.",
            f"Labels: {', '.join(found.labels)}.",
        ],
        models=[role_name(result.role) for result in found.results],
        measures=measures(found),
        texts=found.texts,
        remark=abstention_sentence(found.abstention),
        data=f"{parts['train']:,} training texts, {parts['calibration']:,} for the threshold and "
        f"{parts['test']:,} to measure on, from {files}",
        recipe=recipe_yaml(recipe),
        hashes={**hashes, "checkpoint": trained.digest},
        limits=[
            f"It reads the first {recipe.data.max_tokens:,} tokens of a text at most.",
            "It always names a label, of a text that fits none too: heed the threshold.",
            *found.notes,
        ],
    )


def write_checkpoint_card(folder: Path, card: TaskCard, difference: float) -> None:
    """difference: the most by which a probability differs from the trained checkpoint's."""
    use = f"{_USE}\n\n{_POOLED}" if Facts.load(folder).mean_pooling else _USE
    replay = (
        "Read again by a process that knows transformers alone, it gives the trained checkpoint's "
        f"probabilities to {difference:.2g}."
    )
    write_task_card(folder, card, library="transformers", use=use, replay=replay)


def write_onnx_card(folder: Path, card: TaskCard, replay: Mapping[str, Any]) -> None:
    """replay: what `tasks.onnx.ship_onnx` says of this format."""
    use = f"{_ONNX} {_INT8}" if replay["format"] == "onnx-int8" else _ONNX
    said = (
        f"The table is the checkpoint's. In onnxruntime this file ({replay['format']}, "
        f"{replay['bytes'] / 1e6:,.1f} MB) differs from it by {max(0.0, replay['kl']):.2g} nats a "
        f"text and has {replay['top1_agreement']:.1%} of its likeliest labels, on "
        f"{replay['texts']:,} texts."
    )
    write_task_card(folder, card, library="onnx", use=use, replay=said)

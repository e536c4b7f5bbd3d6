"""A classifier's model cards, one per format."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stillhouse.classify.classifier import Facts
from stillhouse.classify.classify_job import TaskJob
from stillhouse.classify.fit import MODEL
from stillhouse.evaluation.classification_results import ClassificationEvaluation
from stillhouse.evaluation.metrics import metrics_of
from stillhouse.export.model_card import ModelCard, write_card
from stillhouse.number_format import percent, size, tiny
from stillhouse.runfolder import Stage
from stillhouse.section import recipe_yaml
from stillhouse.tasks.task_facts import card_hashes, text_files

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
    "each label in the order above. The tokenizer is next to it; `classifier.json` has the maximum "
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

"""A classifier's ONNX files: a folder each, with everything needed to use them without torch."""

from __future__ import annotations

import shutil
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from stillhouse.classify.classifier import batches, load_classifier
from stillhouse.export.export_config import ClassifierExportRecipe
from stillhouse.export.onnx_export import export_onnx

KEPT = ("*.json", "*.jinja", "*.txt")
"""Files of the checkpoint that are copied next to the ONNX file: configuration and tokenizer."""


def ship_onnx(
    section: ClassifierExportRecipe, model: Path, texts: list[str], out: Path
) -> list[dict[str, Any]]:
    """Export each ONNX format of the recipe to `out`/FORMAT, and replay it on `texts`; returns the
    replays.

    model: the folder of the checkpoint. The checkpoint's texts per second, in the same batches on
    the same CPU, are reported next to the file's. Raises ModelError if an export fails.
    """
    forms = [form for form in section.formats if form != "safetensors"]
    if not forms:
        return []
    classifier = load_classifier(model)
    classifier.model.to("cpu")
    rows = classifier.tokens(texts)
    groups = [[rows[index] for index in chosen] for chosen in batches(rows)]
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

"""What a classifier's head reads."""

from __future__ import annotations

from pathlib import Path

import torch

from stillhouse.classify.classifier import load_classifier
from stillhouse.classify.classifier_students import build_classifier
from stillhouse.classify.classify_config import TruncatedClassifier
from stillhouse.classify.label_prompts import LabelPrompt
from stillhouse.teachers.model_source import resolve_model
from tests import tiny

TEXTS = ["a cat", "the soup of the day was cold and the bread was old"]


def truncated(folder: Path, pooling: str) -> Path:
    teacher = resolve_model(str(tiny.save_model(folder / "teacher")), base=folder)
    prompt = LabelPrompt({"pets": "pets", "food": "food"}, None, "{text}", "{label}")
    section = TruncatedClassifier.model_validate(
        {"start": "truncated", "layers": 2, "pooling": pooling}
    )
    out = folder / pooling
    build_classifier(section, teacher, teacher, prompt, [], max_tokens=32, seed=0, out=out)
    return out


def test_mean_pooling_reads_every_token_of_a_text_and_no_padding(tmp_path: Path) -> None:
    classifier = load_classifier(truncated(tmp_path, "mean"))
    model = classifier.model
    for row, text in zip(classifier.probabilities(TEXTS), TEXTS, strict=True):
        ids_1L = torch.tensor(classifier.tokens([text]))
        with torch.inference_mode():
            states_LD = model.model(input_ids=ids_1L).last_hidden_state[0]
            expected = model.score(states_LD.mean(0)).softmax(-1)
        torch.testing.assert_close(row, expected, atol=1e-6, rtol=1e-5)


def test_last_pooling_is_what_transformers_own_class_reads(tmp_path: Path) -> None:
    classifier = load_classifier(truncated(tmp_path, "last"))
    for row, text in zip(classifier.probabilities(TEXTS), TEXTS, strict=True):
        ids_1L = torch.tensor(classifier.tokens([text]))
        with torch.inference_mode():
            expected = classifier.model(input_ids=ids_1L).logits[0].softmax(-1)
        torch.testing.assert_close(row, expected, atol=1e-6, rtol=1e-5)

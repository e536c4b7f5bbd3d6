"""A classifier's folder is replayed in a process that does not import stillhouse."""

from __future__ import annotations

import ast
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from stillhouse.classify.classifier import load_classifier
from stillhouse.classify.classifier_export import _replay
from stillhouse.classify.classifier_students import build_classifier
from stillhouse.classify.classify_config import PretrainedClassifier, TruncatedClassifier
from stillhouse.classify.label_prompts import LabelPrompt
from stillhouse.errors import ModelError
from stillhouse.export import replay_classifier as script
from stillhouse.export.classifier_gate import ClassifierRows, replay_classifier
from stillhouse.teachers.model_source import resolve_model
from tests import tiny

TEXTS = ["a cat", "the soup of the day was cold and the bread was old", "birds"]
STUDENTS: dict[str, Any] = {
    "last": TruncatedClassifier(start="truncated", layers=2, pooling="last"),
    "mean": TruncatedClassifier(start="truncated", layers=2, pooling="mean"),
}


def classifier(folder: Path, kind: str) -> Path:
    teacher = resolve_model(str(tiny.save_model(folder / "teacher")), base=folder)
    prompt = LabelPrompt({"pets": "pets", "food": "food"}, None, "{text}", "{label}")
    section = STUDENTS.get(kind) or PretrainedClassifier(
        start="pretrained", model=str(folder / "teacher"), head="words"
    )
    out = folder / kind
    build_classifier(section, teacher, teacher, prompt, TEXTS, max_tokens=32, seed=0, out=out)
    return out


def test_the_replay_does_not_import_stillhouse() -> None:
    tree = ast.parse(Path(str(script.__file__)).read_text())
    modules = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    names = {
        name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names
    }
    assert "transformers" in modules
    assert not any(str(name).startswith("stillhouse") for name in modules | names)


@pytest.mark.parametrize("kind", ["last", "mean", "words"])
def test_every_head_predicts_what_the_classifier_predicts(tmp_path: Path, kind: str) -> None:
    folder = classifier(tmp_path, kind)
    assert _replay(load_classifier(folder), folder, TEXTS) < 1e-5


@pytest.mark.run
@pytest.mark.fresh_process
def test_a_fresh_process_predicts_the_same_probabilities(tmp_path: Path) -> None:
    folder = classifier(tmp_path, "mean")
    source = load_classifier(folder)
    read = [TEXTS[0], None, TEXTS[2]]  # the second is longer than the classifier reads
    asked = ClassifierRows(source.tokens(TEXTS), read, mean_pooling=True)
    said_NC = replay_classifier(folder, asked)
    torch.testing.assert_close(said_NC, source.probabilities(TEXTS), atol=1e-5, rtol=1e-4)


def test_wrong_or_missing_weights_are_rejected(tmp_path: Path) -> None:
    folder = classifier(tmp_path, "last")
    source = load_classifier(folder)
    other = Path(shutil.copytree(folder, tmp_path / "other"))
    weights = load_file(other / "model.safetensors")
    name = next(name for name in weights if name.startswith("score"))
    save_file({**weights, name: weights[name] + 0.1 * torch.rand_like(weights[name])},
              other / "model.safetensors", metadata={"format": "pt"})  # fmt: skip
    with pytest.raises(ModelError, match="probabilities differ"):
        _replay(source, other, TEXTS)
    del weights[name]
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="missing: score"):
        _replay(source, other, TEXTS)


def test_a_different_tokenizer_is_rejected(tmp_path: Path) -> None:
    folder = classifier(tmp_path, "last")
    source = load_classifier(folder)
    file = folder / "tokenizer.json"
    raw = json.loads(file.read_text())
    raw["normalizer"] = {"type": "Prepend", "prepend": "b"}
    file.write_text(json.dumps(raw))
    with pytest.raises(ModelError, match="tokenized differently: 'a cat'"):
        _replay(source, folder, TEXTS)

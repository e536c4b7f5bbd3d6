"""Which tokens a classifier reads, and how its logits are computed."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    ModernBertConfig,
    ModernBertModel,
)

from stillhouse.classify import classifier as module
from stillhouse.classify.classifier import Classifier, Facts, load_classifier
from stillhouse.classify.classifier_students import build_classifier, planned_parameters
from stillhouse.classify.classify_config import RandomClassifier, TruncatedClassifier
from stillhouse.classify.label_prompts import LabelPrompt, cut
from stillhouse.classify.label_scoring import score_pairs
from stillhouse.errors import ModelError
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


def test_last_pooling_gives_the_logits_of_the_transformers_class(tmp_path: Path) -> None:
    classifier = load_classifier(truncated(tmp_path, "last"))
    for row, text in zip(classifier.probabilities(TEXTS), TEXTS, strict=True):
        ids_1L = torch.tensor(classifier.tokens([text]))
        with torch.inference_mode():
            expected = classifier.model(input_ids=ids_1L).logits[0].softmax(-1)
        torch.testing.assert_close(row, expected, atol=1e-6, rtol=1e-5)


def test_a_random_encoder_reads_as_many_tokens_as_the_recipe_says(tmp_path: Path) -> None:
    source = resolve_model(str(tiny.save_model(tmp_path / "teacher")), base=tmp_path)
    prompt = LabelPrompt({"pets": "pets", "food": "food"}, None, "{text}", "{label}")
    section = RandomClassifier(start="random", hidden_size=16, heads=2)
    build_classifier(
        section, source, source, prompt, [], max_tokens=700, seed=0, out=tmp_path / "out"
    )
    classifier = load_classifier(tmp_path / "out")
    assert len(classifier.tokens(["x" * 900])[0]) == 700
    assert classifier.model.config.max_position_embeddings == 700


def test_an_encoder_with_another_head_is_not_truncated(tmp_path: Path) -> None:
    ids = dict.fromkeys(("pad", "bos", "eos", "cls", "sep"), 0)
    config = ModernBertConfig(
        vocab_size=len(tiny.tokenizer()), hidden_size=16, intermediate_size=16,
        num_hidden_layers=2, num_attention_heads=2,
        **{f"{name}_token_id": number for name, number in ids.items()},
    )  # fmt: skip
    ModernBertModel(config).save_pretrained(tmp_path)
    source = resolve_model(str(tmp_path), base=tmp_path)
    section = TruncatedClassifier(start="truncated", layers=1)
    with pytest.raises(ModelError, match="no head that is one linear layer"):
        planned_parameters(section, source, ["pets", "food"])


SMALL = {
    "vocab_size": len(tiny.tokenizer()), "hidden_size": 16, "intermediate_size": 16,
    "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
}  # fmt: skip


@pytest.mark.parametrize(
    ("make", "in_one_pass"),
    [
        (lambda: MistralForCausalLM(MistralConfig(**SMALL, sliding_window=8)), False),
        (lambda: MistralForCausalLM(MistralConfig(**SMALL, sliding_window=200)), True),
        (lambda: Gemma2ForCausalLM(Gemma2Config(**SMALL, head_dim=8)), False),
    ],
    ids=["short windows", "long windows", "eager attention"],
)
def test_a_language_models_logits_equal_those_of_separate_passes(
    monkeypatch: pytest.MonkeyPatch, make: Any, in_one_pass: bool
) -> None:
    torch.manual_seed(0)
    model = make().eval()
    for parameter in model.parameters():
        parameter.data.mul_(4)
    prompt = LabelPrompt({"pets": "pets", "food": "food"}, None, "{text}", "{label}", chat=False)
    facts = Facts(prompt.labels, 64, asdict(prompt), prior=[0.1, 0.2])
    classifier = Classifier(model, tiny.tokenizer(), facts)
    assert classifier.words is not None
    rows = classifier.tokens(TEXTS)
    expected_BC = score_pairs(model, rows, classifier.words.labels) - torch.tensor([0.1, 0.2])
    if in_one_pass:
        monkeypatch.delattr(module, "score_pairs")
    logits_BC = classifier.logits(rows)
    torch.testing.assert_close(logits_BC, expected_BC)
    logits_BC.sum().backward()
    assert model.get_input_embeddings().weight.grad.any()


def test_a_text_of_more_tokens_than_characters_is_truncated() -> None:
    words = tiny.tokenizer()
    assert len(words(cut("é" * 20, words, 32))["input_ids"]) == 32
    assert cut("é" * 16, words, 32) == "é" * 16

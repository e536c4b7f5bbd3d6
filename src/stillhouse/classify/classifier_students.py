"""Builds a classifier before training: its initial weights, and its untrained head."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    ModernBertConfig,
    ModernBertForSequenceClassification,
)

from stillhouse.classify.classifier import Facts, load_with_head
from stillhouse.classify.classify_config import (
    ClassifierStudent,
    PretrainedClassifier,
    RandomClassifier,
    TruncatedClassifier,
)
from stillhouse.classify.label_judgment import prior_logits
from stillhouse.classify.label_prompts import LabelPrompt, prompt_tokens
from stillhouse.classify.label_scoring import label_scores
from stillhouse.errors import ModelError, RecipeError
from stillhouse.pruning.sizes import keep_config_layers
from stillhouse.teachers.load_model import load_config, load_model, load_tokenizer
from stillhouse.teachers.model_source import ModelSource, resolve_model
from stillhouse.teachers.older_names import save_tokenizer
from stillhouse.teachers.planned_model import learned_positions
from stillhouse.teachers.quiet import quiet

_PRIOR_TEXTS = 256


def student_source(
    section: ClassifierStudent, teacher: ModelSource | None, base: Path
) -> ModelSource:
    """The model that the student is built from, or whose tokenizer it uses. Raises ModelError."""
    if isinstance(section, PretrainedClassifier):
        return resolve_model(section.model, revision=section.revision, base=base)
    named = section.model if isinstance(section, TruncatedClassifier) else section.tokenizer
    if named is not None:
        return resolve_model(named, base=base)
    assert teacher is not None
    return teacher


def planned_parameters(section: ClassifierStudent, source: ModelSource, labels: list[str]) -> int:
    """Number of the student's parameters with a classification head, from its configuration alone.

    Raises ModelError if the architecture has no such head or cannot be truncated, and RecipeError
    if it has too few layers.
    """
    if isinstance(section, RandomClassifier):
        config = _random_config(section, load_tokenizer(source), labels)
    else:
        config = load_config(source)
        config.num_labels = len(labels)
    try:
        with torch.device("meta"), quiet():
            model = AutoModelForSequenceClassification.from_config(config)
    except (ValueError, KeyError) as error:
        raise _headless(source.path, error) from error
    if isinstance(section, TruncatedClassifier):
        _truncate(model, section.layers, source.path)
    return sum(parameter.numel() for parameter in model.parameters())


def build_classifier(
    section: ClassifierStudent,
    source: ModelSource,
    teacher: ModelSource | None,
    prompt: LabelPrompt,
    texts: list[str],
    *,
    max_tokens: int,
    seed: int,
    out: Path,
) -> dict[str, Any]:
    """Write the untrained student to `out`, in float32; return a summary for the report.

    texts: training texts; a language model's prior is its mean answer to some of them. Raises
    ModelError or RecipeError if the student cannot be built.
    """
    tokenizer = load_tokenizer(source)
    prior = None
    with torch.random.fork_rng(devices=[]), quiet():
        torch.manual_seed(seed)
        if isinstance(section, PretrainedClassifier) and section.head == "words":
            model = load_model(source, dtype=torch.float32)
            words = prompt_tokens(prompt, tokenizer, max_tokens)
            scores = label_scores(model, words.of(texts[:_PRIOR_TEXTS]), words.labels)
            prior = prior_logits("texts", scores, scores).tolist()
        elif isinstance(section, RandomClassifier):
            model = _random(section, tokenizer, list(prompt.labels), teacher, max_tokens)
        else:
            model = _with_head(source.path, list(prompt.labels))
            if isinstance(section, TruncatedClassifier):
                _truncate(model, section.layers, source.path)
    if prior is None:
        _agree_on_padding(model, tokenizer)
    limits = [getattr(model.config.get_text_config(), "max_position_embeddings", None)]
    limits.append(learned_positions(model))  # for RoBERTa, two fewer
    most = min([max_tokens, *(limit for limit in limits if isinstance(limit, int))])
    with quiet():
        model.to(torch.float32).save_pretrained(out)
        save_tokenizer(tokenizer, out)
    shown = asdict(prompt) if prior is not None else None
    pooled = isinstance(section, TruncatedClassifier) and section.pooling == "mean"
    Facts(prompt.labels, most, shown, prior, mean_pooling=pooled).save(out)
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "made_of": source.described,
        "kind": type(model).__name__,
    }


def _names(labels: list[str]) -> dict[str, Any]:
    return {
        "num_labels": len(labels),
        "id2label": dict(enumerate(labels)),
        "label2id": {label: number for number, label in enumerate(labels)},
    }


def _with_head(path: Path, labels: list[str]) -> Any:
    """Load a checkpoint with a new classification head; all other weights must be present."""
    try:
        model, missing = load_with_head(
            path, **_names(labels), dtype=torch.float32, ignore_mismatched_sizes=True
        )
    except (ValueError, KeyError, OSError, RuntimeError) as error:
        raise _headless(path, error) from error
    prefix = f"{model.base_model_prefix}."
    lost = [name for name in missing if name.startswith(prefix)]
    # A pooler is new if the encoder was trained without one; anything else would be a guess.
    lost = [name for name in lost if not name.startswith(f"{prefix}pooler.")]
    if lost:
        raise ModelError(
            f"{len(lost)} weights are missing, such as {lost[0]}",
            where=path,
            fix="copy the model again: config.json and the weights do not belong together",
        )
    return model


def _headless(path: Path, error: Exception) -> ModelError:
    return ModelError(
        f"this model does not support a classification head ({error})",
        where=path,
        fix="use a model whose architecture has a sequence-classification class in transformers",
    )


def _truncate(model: Any, layers: int, path: Path) -> None:
    """Keep only the first layers. path: the model's folder, for messages."""
    stack = getattr(model.base_model, "layers", None)
    if stack is None or not hasattr(model, "score"):
        lacks = "list of layers to cut" if stack is None else "head that is one linear layer"
        raise ModelError(
            f"{type(model).__name__} has no {lacks}",
            where=path,
            fix="use student.start: pretrained, or a model of the Llama family",
        )
    if layers > len(stack):
        raise RecipeError(
            f"the model has {len(stack)} layers, but student.layers is {layers}",
            where="student.layers",
            fix=f"set it to at most {len(stack)}",
        )
    model.base_model.layers = stack[:layers]
    keep_config_layers(model.config, list(range(layers)))


def _random(
    section: RandomClassifier,
    tokenizer: Any,
    labels: list[str],
    teacher: ModelSource | None,
    max_tokens: int,
) -> Any:
    """A ModernBERT with mean pooling: from few texts, it learns the meaning of words long before
    the meaning of their order."""
    config = _random_config(section, tokenizer, labels)
    config.max_position_embeddings = max(config.max_position_embeddings, max_tokens)
    model = ModernBertForSequenceClassification(config)
    if section.teacher_embeddings:
        assert teacher is not None
        words = model.get_input_embeddings().weight
        with torch.no_grad():
            words.copy_(_principal(teacher, len(tokenizer), section.hidden_size, words.std()))
    return model


def _random_config(
    section: RandomClassifier, tokenizer: Any, labels: list[str]
) -> ModernBertConfig:
    return ModernBertConfig(
        vocab_size=len(tokenizer),
        hidden_size=section.hidden_size,
        num_hidden_layers=section.layers,
        num_attention_heads=section.heads,
        intermediate_size=2 * section.hidden_size,
        layer_types=["full_attention"] * section.layers,
        max_position_embeddings=512,
        classifier_pooling="mean",
        pad_token_id=tokenizer.pad_token_id or 0,
        bos_token_id=None,
        eos_token_id=None,
        cls_token_id=None,
        sep_token_id=None,
        **_names(labels),
    )


def _principal(teacher: ModelSource, rows: int, width: int, scale: Any) -> Any:
    """The teacher's token embeddings, centered and scaled; if the student is narrower, projected
    onto their first principal directions."""
    loaded = AutoModel.from_pretrained(
        teacher.path, dtype=torch.float32, local_files_only=True, use_safetensors=True
    )
    table_VD = loaded.get_input_embeddings().weight.detach()
    if rows > len(table_VD) or width > table_VD.shape[1]:
        raise RecipeError(
            f"the teacher's embeddings are {len(table_VD):,} x {table_VD.shape[1]}, but the "
            f"student needs {rows:,} x {width}",
            where="student.hidden_size",
            fix="use a smaller hidden_size, the teacher's tokenizer, or teacher_embeddings: false",
        )
    centered_VD = table_VD[:rows] - table_VD[:rows].mean(0)
    if width < table_VD.shape[1]:
        _, _, directions_DW = torch.svd_lowrank(centered_VD, q=width, niter=4)
        centered_VD = centered_VD @ directions_DW
    return centered_VD / centered_VD.std() * scale


def _agree_on_padding(model: Any, tokenizer: Any) -> None:
    """Give model and tokenizer the same padding token, because a decoder's head reads the last
    token that is not padding."""
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.config.pad_token_id = tokenizer.pad_token_id
    if tokenizer.pad_token_id is None:
        raise ModelError(
            "the tokenizer has neither a padding token nor an end-of-text token",
            where=getattr(tokenizer, "name_or_path", None) or None,
            fix="set pad_token in its tokenizer_config.json",
        )

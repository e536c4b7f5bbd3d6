"""A classifier: a checkpoint folder with weights and everything needed to use them.

Either a classification head on an encoder or decoder, or a language model whose own head scores
the labels after a prompt. Shapes: B texts of a batch, N texts, C labels.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from stillhouse.classify.label_prompts import LabelPrompt, PromptTokens, cut, prompt_tokens
from stillhouse.classify.label_scoring import (
    LabelTree,
    batches_by_length,
    fits_tree,
    label_tree,
    score_pairs,
    tree_log_probabilities,
)
from stillhouse.errors import ModelError
from stillhouse.hardware import choose_precision, default_device
from stillhouse.pipeline.kind import Rows
from stillhouse.shared_work import ALONE, Processes
from stillhouse.tasks.task_facts import StudentFacts
from stillhouse.teachers.load_model import check_loadable, load_model, load_tokenizer
from stillhouse.teachers.quiet import quiet
from stillhouse.teachers.weights import weight_files

TOGETHER = 256
"""Number of new texts that are labeled together."""


@dataclass(frozen=True)
class Facts(StudentFacts):
    """Everything needed to use a classifier's weights.

    labels: each label with its phrase. prompt: a language model's prompt; None for a classification
    head. prior: subtracted from a language model's log-probabilities. threshold: the confidence
    below which the classifier abstains; None if not chosen. mean_pooling: whether the head `score`
    reads the mean of the last hidden states, instead of the last one as in transformers.
    """

    FILE: ClassVar[str] = "classifier.json"
    STUDENT: ClassVar[str] = "a Stillhouse classifier"

    labels: dict[str, str]
    max_tokens: int
    prompt: dict[str, Any] | None = None
    prior: list[float] | None = None
    threshold: float | None = None
    mean_pooling: bool = False


class Classifier:
    """A loaded classifier. `model` may be trained: gradients flow through `logits`."""

    def __init__(self, model: Any, tokenizer: Any, facts: Facts) -> None:
        self.model, self.tokenizer, self.facts = model, tokenizer, facts
        self.labels = list(facts.labels)
        self.words: PromptTokens | None = None
        self.tree: LabelTree | None = None
        if facts.prompt is not None:
            stored = {**facts.prompt, "examples": tuple(map(tuple, facts.prompt["examples"]))}
            self.words = prompt_tokens(LabelPrompt(**stored), tokenizer, facts.max_tokens)
            self.tree = label_tree(self.words.labels)

    def tokens(self, texts: Sequence[str]) -> list[list[int]]:
        """The model's input tokens for each text."""
        if self.words is not None:
            return self.words.of(texts)
        most = self.facts.max_tokens
        shown = [cut(text, self.tokenizer, most) for text in texts]
        encoded = self.tokenizer(shown, truncation=True, max_length=most)["input_ids"]
        # A decoder's head reads the last token, which an empty row lacks.
        blank = [self.tokenizer.pad_token_id or 0]
        return [list(ids) or blank for ids in encoded]

    def logits(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """The logit of each label: [B, C]."""
        device = next(self.model.parameters()).device
        longest = max(map(len, rows))
        if self.words is not None and self.tree is not None:
            if fits_tree(self.model, longest + max(map(len, self.words.labels))):
                scores_BC = tree_log_probabilities(self.model, rows, self.tree.to(device))
            else:
                scores_BC = score_pairs(self.model, rows, self.words.labels).to(device)
            return scores_BC - torch.tensor(self.facts.prior, device=device)
        pad = self.tokenizer.pad_token_id or 0
        ids = [[*row, *[pad] * (longest - len(row))] for row in rows]
        mask = [[1] * len(row) + [0] * (longest - len(row)) for row in rows]
        inputs = {"input_ids": ids, "attention_mask": mask}
        tensors = {name: torch.tensor(value, device=device) for name, value in inputs.items()}
        return self.head_logits(self.model, **tensors)

    def head_logits(self, model: Any, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits of a classification head, [B, C] in float32."""
        if self.facts.mean_pooling:
            hidden_BLD = model.base_model(
                input_ids=input_ids, attention_mask=attention_mask, use_cache=False
            ).last_hidden_state.float()
            mask_BL1 = attention_mask[..., None]
            mean_BD = (hidden_BLD * mask_BL1).sum(1) / mask_BL1.sum(1)
            return model.score(mean_BD.to(model.score.weight.dtype)).float()
        logits_BC: Tensor = model(input_ids=input_ids, attention_mask=attention_mask).logits
        return logits_BC.float()

    @torch.inference_mode()
    def probabilities(self, texts: Sequence[str], processes: Processes = ALONE) -> Tensor:
        """The probability of each label: [N, C] in float32, on the CPU.

        Texts of similar length share a batch. processes: the processes that share the batches; all
        of them must call this with the same texts.
        """
        rows = self.tokens(texts)
        own_NC = torch.zeros(len(rows), len(self.labels))
        for chosen in processes.in_turn(list(batches_by_length([*map(len, rows)]))):
            own_NC[chosen] = self.logits([rows[index] for index in chosen]).softmax(-1).cpu()
        return torch.stack(processes.collect(own_NC)).sum(0)  # each row is 0 in all but one


def check_classifier(folder: Path) -> None:
    """Raise ModelError if `load_classifier` would, reading only the headers of the weights."""
    language_model = Facts.load(folder).prompt is not None
    load_tokenizer(folder)
    check_loadable(
        folder, AutoModelForCausalLM if language_model else AutoModelForSequenceClassification
    )


def load_classifier(folder: Path, *, dtype: torch.dtype = torch.float32) -> Classifier:
    """Load a classifier. Raises ModelError if there is none or it is damaged or incomplete."""
    facts = Facts.load(folder)
    tokenizer = load_tokenizer(folder)
    if facts.prompt is not None:
        model = load_model(folder, dtype=dtype)
    else:
        weight_files(folder)
        model, missing = load_with_head(folder, dtype=dtype)
        if missing:
            raise ModelError(
                f"weights are missing: {missing[0]}",
                where=folder,
                fix="copy the folder again, or recreate it with `stillhouse run`",
            )
    return Classifier(model.to(default_device()).eval(), tokenizer, facts)


def load_with_head(folder: Path, **options: Any) -> tuple[Any, list[str]]:
    """A model with a classification head, and the names of the weights that its folder lacks."""
    with quiet():
        model, info = AutoModelForSequenceClassification.from_pretrained(
            folder, **options, local_files_only=True, use_safetensors=True, output_loading_info=True
        )
    return model, sorted(info["missing_keys"])


# --- labels of new texts --------------------------------------------------------------------------


def classifier_predictor(folder: Path) -> Callable[[Iterable[str]], Rows] | None:
    """A function that labels texts with the classifier in the folder; None if there is none."""
    if not (folder / Facts.FILE).is_file():
        return None
    dtype = choose_precision("auto").dtype
    return partial(predictions, load_classifier(folder, dtype=dtype))


def predictions(classifier: Classifier, texts: Iterable[str]) -> Iterator[dict[str, Any]]:
    """In the order of the texts: text, label, confidence, probabilities, abstain.

    abstain: whether the confidence is below the threshold that the run chose; None without one.
    """
    texts = iter(texts)
    threshold = classifier.facts.threshold
    while some := list(itertools.islice(texts, TOGETHER)):
        p_NC = classifier.probabilities(some)
        for text, p_C in zip(some, p_NC.tolist(), strict=True):
            best = max(range(len(p_C)), key=p_C.__getitem__)
            yield {
                "text": text,
                "label": classifier.labels[best],
                "confidence": round(p_C[best], 6),
                "abstain": None if threshold is None else p_C[best] < threshold,
                "probabilities": {
                    label: round(p, 6) for label, p in zip(classifier.labels, p_C, strict=True)
                },
            }

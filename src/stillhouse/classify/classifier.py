"""A classifier: a checkpoint folder with weights and everything needed to use them.

Either a classification head on an encoder or decoder, or a language model whose own head scores
the labels after a prompt. Shapes: B texts of a batch, N texts, C labels.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from stillhouse.atomic_files import write_atomically
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
from stillhouse.hardware import default_device
from stillhouse.shared_work import ALONE, Processes
from stillhouse.teachers.load_model import check_loadable, load_model, load_tokenizer
from stillhouse.teachers.quiet import quiet
from stillhouse.teachers.weights import weight_files

FACTS = "classifier.json"


@dataclass(frozen=True)
class Facts:
    """Everything needed to use a classifier's weights.

    labels: each label with its phrase. prompt: a language model's prompt; None for a classification
    head. prior: subtracted from a language model's log-probabilities. threshold: the confidence
    below which the classifier abstains; None if not chosen. mean_pooling: whether the head `score`
    reads the mean of the last hidden states, instead of the last one as in transformers.
    """

    labels: dict[str, str]
    max_tokens: int
    prompt: dict[str, Any] | None = None
    prior: list[float] | None = None
    threshold: float | None = None
    mean_pooling: bool = False

    def save(self, folder: Path) -> None:
        write_atomically(folder / FACTS, json.dumps(asdict(self), ensure_ascii=False, indent=2))

    @classmethod
    def load(cls, folder: Path) -> Facts:
        try:
            return cls(**json.loads((folder / FACTS).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise ModelError(
                f"this folder does not contain a Stillhouse classifier ({error})",
                where=folder / FACTS,
                fix="use the run folder of a recipe with `task`, or its model",
            ) from None


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
        if self.words is not None and self.tree is not None:
            longest = max(map(len, rows)) + max(map(len, self.words.labels))
            if fits_tree(self.model, longest):
                scores_BC = tree_log_probabilities(self.model, rows, self.tree.to(device))
            else:
                scores_BC = score_pairs(self.model, rows, self.words.labels).to(device)
            return scores_BC - torch.tensor(self.facts.prior, device=device)
        longest = max(map(len, rows))
        pad = self.tokenizer.pad_token_id or 0
        ids = [[*row, *[pad] * (longest - len(row))] for row in rows]
        mask = [[1] * len(row) + [0] * (longest - len(row)) for row in rows]
        inputs = {"input_ids": ids, "attention_mask": mask}
        tensors = {name: torch.tensor(value, device=device) for name, value in inputs.items()}
        return self.head_logits(self.model, **tensors)

    def head_logits(self, model: Any, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits of a classification head, [B, C] in float32."""
        if self.facts.mean_pooling:
            return _read_mean(model, input_ids, attention_mask)
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


def _read_mean(model: Any, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    hidden_BLD = model.base_model(
        input_ids=input_ids, attention_mask=attention_mask, use_cache=False
    ).last_hidden_state.float()
    mask_BL1 = attention_mask[..., None]
    mean_BD = (hidden_BLD * mask_BL1).sum(1) / mask_BL1.sum(1)
    return model.score(mean_BD.to(model.score.weight.dtype)).float()


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
        with quiet():
            model, info = AutoModelForSequenceClassification.from_pretrained(
                folder,
                dtype=dtype,
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
            )
        if info["missing_keys"]:
            raise ModelError(
                f"weights are missing: {sorted(info['missing_keys'])[0]}",
                where=folder,
                fix="copy the folder again, or recreate it with `stillhouse run`",
            )
    return Classifier(model.to(default_device()).eval(), tokenizer, facts)

"""A teacher that is one model on this machine."""

from __future__ import annotations

from typing import Any

import torch

from stillhouse.account import count_parameters, forward_flops
from stillhouse.data.batches import Batch
from stillhouse.data.shift import supervised_rows
from stillhouse.signals import DenseSignal
from stillhouse.teachers.activations import ActivationRequest, run_backbone
from stillhouse.teachers.backbone import lm_head
from stillhouse.teachers.load import load_model, load_tokenizer
from stillhouse.teachers.model_source import ModelSource
from stillhouse.teachers.shared_vocabulary import check_rows
from stillhouse.teachers.short_attention import use_short_attention
from stillhouse.teachers.teacher import OUTPUT_ONLY, Teacher, TeacherView


class LocalTeacher(Teacher):
    """Whole distributions and every activation, by a forward pass for each batch.

    model: a causal language model; it is put into eval mode. tokenizer: None where only token ids
    are known; the vocabulary is then all rows of the head.
    Raises ModelError: the tokenizer has ids for which the model has no row.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        *,
        described: str | None = None,
        fingerprint: str = "",
    ) -> None:
        self.model = model.eval()
        self.described = described or model.config.name_or_path or type(model).__name__
        self.fingerprint = fingerprint
        self._tokenizer = tokenizer
        rows = lm_head(model).weight_VD.shape[0]
        self.vocabulary = rows if tokenizer is None else check_rows(tokenizer, rows, "teacher")

    @property
    def tokenizer(self) -> Any:
        return self._tokenizer

    @property
    def config(self) -> Any:
        return self.model.config

    @torch.no_grad()
    def answer(self, batch: Batch, request: ActivationRequest = OUTPUT_ONLY) -> TeacherView:
        device = self.model.device
        labels_RL = batch["labels"].to(device)
        ids_RL, positions_RL = batch["input_ids"].to(device), batch["position_ids"].to(device)
        found = run_backbone(self.model, ids_RL, positions_RL, request)
        signal = DenseSignal(supervised_rows(found.last_RLD, labels_RL), lm_head(self.model))
        layers = {i: supervised_rows(rows_RLD, labels_RL) for i, rows_RLD in found.layers.items()}
        return TeacherView((signal,), layers, found.attention)

    def place(self, device: torch.device, context: int) -> None:
        self.model.to(device)
        use_short_attention(self.model, context, device)

    def flops(self, tokens: int) -> int:
        return forward_flops(count_parameters(self.model).head_once, tokens)

    @property
    def memory_bytes(self) -> int:
        return sum(each.numel() * each.element_size() for each in self.model.parameters())

    def __repr__(self) -> str:
        size = count_parameters(self.model).total
        dtype = str(self.model.dtype).removeprefix("torch.")
        return (
            f"Teacher({self.described}: {size / 1e6:,.1f}M parameters in {dtype} on "
            f"{self.model.device}, {self.vocabulary:,} tokens)"
        )


def load_teacher(
    source: ModelSource, *, dtype: torch.dtype, trust_remote_code: bool = False
) -> LocalTeacher:
    """The model of a folder as a teacher, on the CPU. Raises ModelError as `load_model`."""
    code = trust_remote_code
    return LocalTeacher(
        load_model(source.path, dtype=dtype, trust_remote_code=code),
        load_tokenizer(source.path, trust_remote_code=code),
        described=source.described,
        fingerprint=source.fingerprint,
    )

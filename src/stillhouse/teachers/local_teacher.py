"""A teacher that runs on this machine."""

from __future__ import annotations

from contextlib import ExitStack, suppress
from typing import Any

import torch
from torch import nn

from stillhouse.account import count_parameters, described, forward_flops
from stillhouse.data.batches import Batch, documents_of, positions_of
from stillhouse.data.shift import supervised_rows
from stillhouse.errors import ModelError
from stillhouse.signals import DenseSignal, LMHead
from stillhouse.teachers.activations import ActivationRequest, decoder_layers, run_backbone
from stillhouse.teachers.backbone import lm_head
from stillhouse.teachers.load_model import load_model, load_tokenizer
from stillhouse.teachers.mapped_weights import MappedWeights, map_weights
from stillhouse.teachers.model_source import AnyModel, ModelSource, source_of
from stillhouse.teachers.packed_attention import use_attention
from stillhouse.teachers.shared_vocabulary import check_rows
from stillhouse.teachers.teacher import OUTPUT_ONLY, Teacher, TeacherView, require_teacher
from stillhouse.teachers.weights import weight_files


class LocalTeacher(Teacher):
    """Runs a forward pass for each batch, and returns full distributions and any activation.

    model: a causal language model; it is put into eval mode. tokenizer: None if only token ids
    are known; the vocabulary then has all rows of the head. source: where the model was loaded
    from. Raises ModelError: the tokenizer has ids for which the model has no row.
    """

    def __init__(
        self, model: Any, tokenizer: Any = None, *, source: AnyModel | None = None
    ) -> None:
        self.model = model.eval()
        self.source = None if source is None else source_of(source)
        name = model.config.name_or_path or type(model).__name__
        self.described = (self.source and self.source.described) or name
        self.fingerprint = self.source.fingerprint if self.source else ""
        self.tokenizer, self.config = tokenizer, model.config
        self._mapped: dict[nn.Module, MappedWeights] = {}
        rows = lm_head(model).weight_VD.shape[0]
        self.vocabulary = rows if tokenizer is None else check_rows(tokenizer, rows, "teacher")

    @property
    def head(self) -> LMHead:
        return lm_head(self.model)

    @torch.no_grad()
    def answer(self, batch: Batch, request: ActivationRequest = OUTPUT_ONLY) -> TeacherView:
        device = self.model.device
        ids_RL, place_RL, positions_N = (
            each.to(device, non_blocking=True)
            for each in (batch["input_ids"], batch["position_ids"], positions_of(batch))
        )
        documents = documents_of(batch)
        if documents is not None:
            documents = documents.to(device, non_blocking=True)
        with ExitStack() as stack:
            for layer in self._mapped:
                stack.enter_context(layer.register_forward_hook(self._release))
            found = run_backbone(self.model, ids_RL, place_RL, request, documents)
        signal = DenseSignal(supervised_rows(found.last_RLD, positions_N), self.head)
        layers = {i: supervised_rows(rows_RLD, positions_N) for i, rows_RLD in found.layers.items()}
        return TeacherView((signal,), layers, found.attention)

    def place(self, device: torch.device, context: int) -> None:
        self.model.to(device)
        use_attention(self.model, context, device, self.model.dtype)
        if self.source is not None and device.type == "cpu" and not self._mapped:
            with suppress(ModelError):  # the files may be gone by now
                files = weight_files(self.source.path)
                self._mapped = map_weights(self.model, decoder_layers(self.model), files)

    def _release(self, layer: nn.Module, *_: object) -> None:
        """Release a memory-mapped layer, which has just run."""
        self._mapped[layer].release()

    def flops(self, tokens: int) -> int:
        return forward_flops(count_parameters(self.model).active, tokens)

    def __repr__(self) -> str:
        return f"Teacher({self.described}: {described(self.model)}, {self.vocabulary:,} tokens)"


def load_teacher(source: ModelSource, *, dtype: torch.dtype) -> LocalTeacher:
    """Load a model folder as a teacher, on the CPU. Raises ModelError as `load_model` does."""
    return LocalTeacher(load_model(source, dtype=dtype), load_tokenizer(source), source=source)


def local(teacher: Teacher | None) -> LocalTeacher:
    """The teacher, if it is a model on this machine. Raises ModelError otherwise."""
    if isinstance(teacher, LocalTeacher):
        return teacher
    if teacher is not None:
        require_teacher(teacher)
    what = "there is no teacher" if teacher is None else f"{teacher.described} is not loaded here"
    raise ModelError(what, where="teacher", fix="load a model with Teacher.load")

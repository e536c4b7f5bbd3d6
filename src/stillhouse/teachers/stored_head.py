"""A checkpoint's head without the rest of the model."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stillhouse.errors import ModelError
from stillhouse.signals.signal_types import LMHead
from stillhouse.teachers.backbone import lm_head, trim_head
from stillhouse.teachers.load_model import check_head_once, load_config, load_model
from stillhouse.teachers.model_source import AnyModel, source_of
from stillhouse.teachers.planned_model import planned_model
from stillhouse.teachers.weights import read_tensors, weight_files


def load_head(checkpoint: AnyModel, *, dtype: torch.dtype) -> LMHead:
    """Load the head of a model folder, on the CPU. Raises ModelError as `load_model` does.

    Other weights are read only if the model's logits do not come from `base_model`'s output
    alone, or if its files store the head quantized or under a different name.
    """
    source = source_of(checkpoint)
    path = source.path
    model = planned_model(load_config(source), path, trusted=source.trusted)
    head = lm_head(model)
    weight_VD = _stored(path, _names(model, head.weight_VD))
    bias = head.bias_V
    bias_V = None if bias is None else _stored(path, _names(model, bias))
    if weight_VD is None or (bias is not None and bias_V is None):
        return lm_head(load_model(source, dtype=dtype))
    output = model.get_output_embeddings()
    output.weight = nn.Parameter(weight_VD, requires_grad=False)
    if bias_V is not None:
        output.bias = nn.Parameter(bias_V.to(weight_VD.dtype), requires_grad=False)
    try:
        check_head_once(model, path)
    except (ModelError, RuntimeError):  # its logits need more of the model than was loaded
        return lm_head(load_model(source, dtype=dtype))
    bias_V = None if bias_V is None else bias_V.to(dtype)
    return replace(head, weight_VD=weight_VD.to(dtype), bias_V=bias_V)


def linear_map(head: LMHead, vocabulary: int) -> Tensor:
    """The matrix W [V, D] of logits = W h, in float32: the head's first rows times its scale."""
    return trim_head(head, vocabulary).weight_VD.detach().float() * head.scale


def head_sha256(head: LMHead) -> str:
    """SHA-256 of the head's weight and scale, equal for heads that are equal in float32."""
    values = head.weight_VD.detach().float().contiguous().cpu().numpy()
    return hashlib.sha256(f"{values.shape} {head.scale} ".encode() + values.tobytes()).hexdigest()


def _names(model: Any, tensor: Tensor) -> list[str]:
    """All names of a parameter, including the embeddings' name if they are tied to the head."""
    named = model.named_parameters(remove_duplicate=False)
    names = [name for name, parameter in named if parameter is tensor]
    if model.config.get_text_config().tie_word_embeddings:
        embeddings = model.get_input_embeddings().weight
        names += [name for name, each in model.named_parameters() if each is embeddings]
    return names


def _stored(path: Path, names: list[str]) -> Tensor | None:
    """The first of these tensors that is stored; None if it is quantized or none is stored."""
    found = read_tensors(weight_files(path), names)
    stored = next((found[name] for name in names if name in found), None)
    quantized = stored is not None and (stored.element_size() < 2 or not stored.is_floating_point())
    return None if quantized else stored

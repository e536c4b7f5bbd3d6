"""Cuts a model in place, keeps its configuration true, and checks what was saved.

Shapes: D hidden width, F FFN width, K kept neurons.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stillhouse.errors import ModelError
from stillhouse.pruning.axes import PER_LAYER_LISTS, Axes, part
from stillhouse.teachers.local import load_model
from stillhouse.teachers.quiet import quiet
from stillhouse.teachers.views import decoder_layers


def keep_neurons(layer: nn.Module, axes: Axes, kept_K: Tensor, down_DK: Tensor) -> None:
    """Leaves the FFN neurons `kept_K` of one layer, with `down_DK` as the new down projection."""
    ffn = part(layer, axes.ffn)
    for name in (axes.gate, axes.up):
        linear = part(ffn, name)
        linear.weight = _parameter(linear.weight[kept_K], linear.weight)
        if linear.bias is not None:
            linear.bias = _parameter(linear.bias[kept_K], linear.bias)
        linear.out_features = len(kept_K)
    down = part(ffn, axes.down)
    down.weight = _parameter(down_DK, down.weight)
    down.in_features = len(kept_K)
    if hasattr(ffn, "intermediate_size"):
        ffn.intermediate_size = len(kept_K)


def keep_layers(model: Any, kept: Sequence[int]) -> None:
    """Leaves the layers `kept`, renumbers them for the key-value cache, and updates the config."""
    old = list(decoder_layers(model))
    model.base_model.layers = nn.ModuleList(old[index] for index in kept)
    for number, layer in enumerate(decoder_layers(model)):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                setattr(module, "layer_idx", number)  # noqa: B010 (a plain int beside tensors)
    keep_config_layers(model.config, kept)


def keep_config_layers(config: Any, kept: Sequence[int]) -> None:
    """num_hidden_layers and every per-layer list, for the layers `kept` (indices may repeat)."""
    for name in PER_LAYER_LISTS:
        values = getattr(config, name, None)
        if isinstance(values, list) and len(values) == config.num_hidden_layers:
            setattr(config, name, [values[index] for index in kept])
    config.num_hidden_layers = len(kept)


def own_config(model: Any) -> None:
    """Gives the model a configuration that no other object shares, before it is changed."""
    config = copy.deepcopy(model.config)
    for module in model.modules():
        if hasattr(module, "config"):
            module.config = config


@torch.no_grad()
def check_saved(model: Any, folder: Path, input_ids_RL: Tensor) -> None:
    """Loads `folder` anew and compares logits with the model in memory.

    Raises ModelError when a weight is missing or left over, or the logits differ.
    """
    with quiet():
        expected = model(input_ids=input_ids_RL, use_cache=False).logits
        loaded = load_model(folder, dtype=torch.float32)
        found = loaded(input_ids=input_ids_RL, use_cache=False).logits
    error = (found - expected).abs().max().item() / max(expected.abs().max().item(), 1e-6)
    if not error <= 1e-5:
        raise ModelError(
            f"the saved checkpoint does not load as the same model: logits differ by {error:.2g}",
            where=folder,
            fix="this is a defect of Stillhouse for this architecture: please report it",
        )


def _parameter(values: Tensor, like: Tensor) -> nn.Parameter:
    values = values.detach().to(like.dtype).clone(memory_format=torch.contiguous_format)
    return nn.Parameter(values, requires_grad=like.requires_grad)

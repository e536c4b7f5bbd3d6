"""Conversion of a quantized model that transformers has loaded to one with float weights."""

from __future__ import annotations

import copy
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor

from stillhouse.teachers.quiet import quiet


@torch.no_grad()
def set_buffers(model: Any) -> None:
    """Set all buffers of a loaded model that its checkpoint does not contain.

    When transformers loads a quantized weight, it considers the weight's whole module initialized,
    so the module's other buffers (the scale of Gemma 3's embeddings) stay uninitialized memory.
    """
    with init_empty_weights(include_buffers=False), quiet():
        fresh = type(model)(copy.deepcopy(model.config))
    values = dict(fresh.named_buffers())
    for name, buffer in model.named_buffers():
        owner, _, own = name.rpartition(".")
        derived = own in model.get_submodule(owner)._non_persistent_buffers_set
        if derived and name in values and values[name].shape == buffer.shape:
            buffer.copy_(values[name])


def dequantize(model: Any, dtype: torch.dtype) -> None:
    """Replace torchao's tensors with plain ones of the same values.

    torchao's lack most operations, and on a CPU they are dequantized in every product anyway.
    Tensors that also quantize a layer's inputs are kept.
    """
    floats: dict[int, torch.nn.Parameter] = {}  # a tied weight stays one parameter
    for module in model.modules():
        for name, weight in module.named_parameters(recurse=False):
            if hasattr(weight, "qdata") and not _rounds_inputs(weight):
                if id(weight) not in floats:
                    plain = torch.nn.Parameter(float_values(weight).to(dtype), requires_grad=False)
                    floats[id(weight)] = plain
                setattr(module, name, floats[id(weight)])


def _rounds_inputs(weight: Any) -> bool:
    names = ("activation_quantization", "act_quant_kwargs")
    return any(getattr(weight, name, None) is not None for name in names)


def float_values(weight: Tensor) -> Tensor:
    """The values of a weight, which can be one of torchao's tensors or stored in 8-bit floats."""
    values: Tensor = weight.dequantize() if hasattr(weight, "qdata") else weight
    return values.float() if values.element_size() == 1 else values

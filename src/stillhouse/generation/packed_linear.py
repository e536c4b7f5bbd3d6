"""Linear layers on x86 CPUs that multiply by weights packed in oneDNN's layout.

A decoding pass multiplies few rows by each weight, and oneDNN spends much of the time on reordering
the weight. Here it is reordered once, for many passes. In float32, PyTorch would call MKL (see
`cpu_products`). The operators are those that PyTorch's compiler generates for a frozen model. They
are not public, so they are tried once, and if they fail, layers stay unchanged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from stillhouse import cpu_products
from stillhouse.generation.kv_cache import fits_padding
from stillhouse.hardware import choose_precision, free_memory_bytes
from stillhouse.launch import processes_here

SHARE = 0.25
"""Maximum share of the free memory that copies of a model's weights may take."""

Multiply = Callable[[Tensor], Tensor]


@contextmanager
def packed_linear(model: Any, dtype: torch.dtype | None = None) -> Iterator[frozenset[Tensor]]:
    """Inside the block, make linear layers multiply by packed copies of their weights.

    dtype: of the copies; None: the same as each weight's. Changes to the weights have no effect
    inside the block. Yields the weights that nothing else reads. Layers stay unchanged on other
    devices, with sharded or quantized weights, with a custom forward, or under autocast.
    """
    layers = _layers(model, dtype)
    try:
        for layer in layers:
            vars(layer)["forward"] = _multiply(layer, dtype or layer.weight.dtype)
        yield _only_theirs(model, layers)
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)


def has_room_to_pack(model: Any) -> bool:
    """Whether copies of a model's weights take only a small part of the free memory."""
    need = sum(layer.weight.nbytes for layer in _layers(model, None))
    return need * processes_here() <= SHARE * free_memory_bytes("cpu")


def is_faster_packed(rows: int, dtype: torch.dtype) -> bool:
    """Whether packed weights are faster for this many rows. For one row in float32 without
    AVX-512, MKL is faster than oneDNN (docs/experiments.md#packed-weights)."""
    wide = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    return rows > 1 or dtype != torch.float32 or wide


def _layers(model: Any, dtype: torch.dtype | None) -> list[nn.Linear]:
    # Recurrent layers read the weights of their linear layers directly.
    if torch.is_autocast_enabled("cpu") or not fits_padding(model):
        return []
    return [layer for layer in model.modules() if _is_packable(layer, dtype)]


def _is_packable(layer: nn.Module, dtype: torch.dtype | None) -> bool:
    return (
        type(layer) is nn.Linear
        and "forward" not in vars(layer)
        and type(layer.weight) is nn.Parameter
        and layer.weight.device.type == "cpu"
        and bool(torch.backends.mkldnn.enabled)
        and can_pack(dtype or layer.weight.dtype)
    )


def _multiply(layer: nn.Linear, dtype: torch.dtype) -> Multiply:
    weight = _packed(layer.weight.detach().to(dtype))
    bias = None if layer.bias is None else layer.bias.detach().to(dtype)

    def multiply(inputs: Tensor) -> Tensor:
        return _product(inputs.to(dtype), weight, bias)

    return multiply


def _only_theirs(model: Any, layers: list[nn.Linear]) -> frozenset[Tensor]:
    """The layers' weights that no other module uses, unlike a tied head's. Empty for a model with
    custom code, which might read any of them."""
    if not type(model).__module__.startswith("transformers."):
        return frozenset()
    packed = set(layers)
    others = [module for module in model.modules() if module not in packed]
    shared = {each for module in others for each in module.parameters(recurse=False)}
    return frozenset(layer.weight for layer in layers if layer.weight not in shared)


def _packed(weight_MK: Tensor) -> Any:
    """Pack a weight into an opaque tensor, for any number of rows."""
    return torch.ops.mkldnn._reorder_linear_weight(weight_MK.contiguous(), None)


def _product(inputs: Tensor, packed: Any, bias_M: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(inputs, packed, bias_M, "none", [], "")


@cache
def can_pack(dtype: torch.dtype) -> bool:
    """Whether this build of PyTorch has the operators, they are correct, and the x86 CPU computes
    natively in this dtype."""
    native = (torch.float32, choose_precision("auto", "cpu").dtype)
    if dtype not in native or not cpu_products.works():
        return False
    # With small integers, every product and sum is exact in 8 bits.
    inputs_NK = (torch.arange(40 * 3) % 5).view(40, 3).to(dtype)
    weight_MK, bias_M = (torch.arange(7 * 3) % 4).view(7, 3).to(dtype), torch.ones(7).to(dtype)
    expected_NM = nn.functional.linear(inputs_NK, weight_MK, bias_M)
    try:
        return torch.equal(_product(inputs_NK, _packed(weight_MK), bias_M), expected_NM)
    except (AttributeError, RuntimeError):
        return False

"""Linear layers on x86 CPUs that multiply by weights in oneDNN's own layout.

A pass that adds a token to each sequence multiplies few rows by each weight, and much of the time
oneDNN rearranges the weight for that: here it is done once, for many passes. In float32 PyTorch
would call MKL (see `cpu_products`). The operators are those that PyTorch's compiler generates for a
frozen model. They are not public: they are tried once, and if they fail, layers stay as they are.
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
"""Of the free memory: the most that copies of a model's weights may take."""

Multiply = Callable[[Tensor], Tensor]


@contextmanager
def packed_linear(model: Any, dtype: torch.dtype | None = None) -> Iterator[frozenset[Tensor]]:
    """In the block, linear layers multiply by copies of their weights in `dtype`, or in the type
    that each has; changes of the weights have no effect.

    Yields the weights that nothing else reads. Layers stay as they are on other devices, with
    sharded or quantized weights, with a forward of their own, or under autocast.
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
    """Whether the copies of a model's weights take a small part of the free memory."""
    need = sum(layer.weight.nbytes for layer in _layers(model, None))
    return need * processes_here() <= SHARE * free_memory_bytes("cpu")


def is_faster_packed(rows: int, dtype: torch.dtype) -> bool:
    """Whether packed weights multiply that many rows faster: for one row in float32, MKL is faster
    than oneDNN without AVX-512 (docs/experiments.md#packed-weights)."""
    wide = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    return rows > 1 or dtype != torch.float32 or wide


def _layers(model: Any, dtype: torch.dtype | None) -> list[nn.Linear]:
    # Recurrent layers read the weights of their linear layers themselves.
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
    """Weights of the layers that no other module has, as an embedding has that of a tied head. Code
    that comes with a model may read any of them."""
    if not type(model).__module__.startswith("transformers."):
        return frozenset()
    packed = set(layers)
    others = [module for module in model.modules() if module not in packed]
    shared = {each for module in others for each in module.parameters(recurse=False)}
    return frozenset(layer.weight for layer in layers if layer.weight not in shared)


def _packed(weight_MK: Tensor) -> Any:
    """An opaque tensor. It fits any number of rows."""
    return torch.ops.mkldnn._reorder_linear_weight(weight_MK.contiguous(), None)


def _product(inputs: Tensor, packed: Any, bias_M: Tensor | None) -> Tensor:
    found: Tensor = torch.ops.mkldnn._linear_pointwise(inputs, packed, bias_M, "none", [], "")
    return found


@cache
def can_pack(dtype: torch.dtype) -> bool:
    """Whether this build of PyTorch has the operators, on an x86 CPU that computes natively in that
    type, and they are right."""
    native = (torch.float32, choose_precision("auto", "cpu").dtype)
    if dtype not in native or not cpu_products.works():
        return False
    # Small integers: every product and sum is exact in 8 bits.
    inputs_NK = (torch.arange(40 * 3) % 5).view(40, 3).to(dtype)
    weight_MK, bias_M = (torch.arange(7 * 3) % 4).view(7, 3).to(dtype), torch.ones(7).to(dtype)
    expected_NM = nn.functional.linear(inputs_NK, weight_MK, bias_M)
    try:
        return torch.equal(_product(inputs_NK, _packed(weight_MK), bias_M), expected_NM)
    except (AttributeError, RuntimeError):
        return False

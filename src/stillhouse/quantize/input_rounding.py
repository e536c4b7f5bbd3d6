"""Dynamic quantization of linear layers' inputs to 8 bits, per token, like torchao.

Shapes: ... tokens, I inputs of a layer.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from stillhouse.quantize.grid import FLOAT8, Grid
from stillhouse.quantize.quantization import Quantization

LOWEST, HIGHEST = -128, 127


def rounded_inputs(inputs_I: Tensor, *, floating: bool = False) -> Tensor:
    """Round inputs to 256 evenly spaced numbers between each token's minimum and maximum, always
    including 0.

    floating: round to float8 instead, scaled so that each token's largest number is float8's
        largest number.

    Gradients pass as if nothing was rounded (straight-through estimator, arXiv 1308.3432).
    """
    with torch.no_grad():
        on_grid_I = _in_float8(inputs_I) if floating else _in_int8(inputs_I)
    return inputs_I + (on_grid_I - inputs_I).detach()


def _in_int8(inputs_I: Tensor) -> Tensor:
    low_1 = inputs_I.amin(-1, keepdim=True).clamp(max=0)
    high_1 = inputs_I.amax(-1, keepdim=True).clamp(min=0)
    scale_1 = (high_1 - low_1) / (HIGHEST - LOWEST)
    scale_1 = scale_1.clamp(min=torch.finfo(inputs_I.dtype).eps)
    zero_1 = (LOWEST - (low_1 / scale_1).round()).clamp(LOWEST, HIGHEST)
    codes_I = (inputs_I * (1 / scale_1)).round().add(zero_1).clamp(LOWEST, HIGHEST)
    return (codes_I - zero_1) * scale_1


def _in_float8(inputs_I: Tensor) -> Tensor:
    largest = torch.finfo(FLOAT8).max
    scale_1 = (inputs_I.abs().amax(-1, keepdim=True) / largest).float()
    scale_1 = scale_1.clamp(min=torch.finfo(torch.float32).tiny)  # For tokens that are all zeros.
    codes_I = (inputs_I.float() / scale_1).clamp(-largest, largest).to(FLOAT8)
    return (codes_I.float() * scale_1).to(inputs_I.dtype)


def round_inputs_of(model: nn.Module, weights: Iterable[str], grid: Grid) -> list[RemovableHandle]:
    """Round these linear layers' inputs, to float8 if the grid's weights are float8. Call
    `remove()` on each handle to stop."""
    modules = dict(model.named_modules())

    def before(_module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return (rounded_inputs(inputs[0], floating=grid.floating), *inputs[1:])

    chosen = [modules[name.removesuffix(".weight")] for name in weights]
    return [module.register_forward_pre_hook(before) for module in chosen]


def round_inputs(quantization: Quantization, model: Any) -> list[RemovableHandle]:
    """`round_inputs_of` for the layers whose inputs are rounded in the export; none if the
    quantization is not dynamic."""
    if not quantization.dynamic:
        return []
    return round_inputs_of(model, quantization.linear_layers(model), quantization.grid)

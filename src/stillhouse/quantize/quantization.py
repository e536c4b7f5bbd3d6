"""A student's quantization, saved next to its checkpoint, whose weights are already rounded.

With dynamic quantization, linear layers' inputs are also rounded to 8 bits, per token, like torchao
does.

Shapes: O rows (outputs), G groups in a row, ... tokens, I inputs of a layer.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from stillhouse.quantize.grid import FLOAT8, Grid, on_grid

FILE = "quantization.safetensors"
LOWEST, HIGHEST = -128, 127


@dataclass(frozen=True)
class Quantization:
    """How a student is quantized.

    dynamic: whether inputs are rounded too.
    scales: the scales [O, G] of each quantized matrix, by its name.
    """

    grid: Grid
    dynamic: bool
    scales: dict[str, Tensor]

    @torch.no_grad()
    def apply(self, model: nn.Module) -> None:
        """Round the model's matrices to the grid, in place."""
        weights = dict(model.named_parameters())
        for name, scales_OG in self.scales.items():
            scales_OG = scales_OG.to(weights[name].device)
            weights[name].data.copy_(on_grid(weights[name], scales_OG, self.grid))

    def dynamic_layers(self, model: Any) -> list[str]:
        """Names of the quantized matrices whose inputs are rounded, if quantization is dynamic:
        linear layers other than the head."""
        if not self.dynamic:
            return []
        head = model.get_output_embeddings()
        shared = None if head is None else head.weight
        modules = dict(model.named_modules())
        return [
            name
            for name in self.scales
            if isinstance(layer := modules[name.removesuffix(".weight")], nn.Linear)
            and layer.weight is not shared
        ]

    def round_inputs(self, model: Any) -> list[RemovableHandle]:
        """Round the inputs of `dynamic_layers`, to float8 if weights are. Call `remove()` on each
        handle to stop."""

        def before(_module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            return (rounded_inputs(inputs[0], floating=self.grid.floating), *inputs[1:])

        modules = dict(model.named_modules())
        chosen = [modules[name.removesuffix(".weight")] for name in self.dynamic_layers(model)]
        return [module.register_forward_pre_hook(before) for module in chosen]

    def save(self, file: Path) -> None:
        facts = {**asdict(self.grid), "dynamic": self.dynamic}
        scales = {
            name: scales_OG.half().cpu().contiguous() for name, scales_OG in self.scales.items()
        }
        save_file(scales, file, metadata={"quantization": json.dumps(facts)})

    @classmethod
    def load(cls, file: Path) -> Quantization:
        with safe_open(file, framework="pt") as opened:
            facts = json.loads(opened.metadata()["quantization"])
            scales = {name: opened.get_tensor(name).float() for name in opened.keys()}  # noqa: SIM118
        grid = Grid(facts["bits"], facts["group"], facts["floating"])
        return cls(grid, facts["dynamic"], scales)


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

"""A student's quantization, saved next to its checkpoint, whose weights are already rounded."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from stillhouse.quantize.grid import Grid, on_grid

FILE = "quantization.safetensors"


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

    def linear_layers(self, model: Any) -> list[str]:
        """Names of the quantized matrices whose inputs can be rounded: linear layers other than the
        head."""
        head = model.get_output_embeddings()
        shared = None if head is None else head.weight
        modules = dict(model.named_modules())
        return [
            name
            for name in self.scales
            if isinstance(layer := modules[name.removesuffix(".weight")], nn.Linear)
            and layer.weight is not shared
        ]

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
            names = list(opened.keys())
            scales = {name: opened.get_tensor(name).float() for name in names}
        grid = Grid(facts["bits"], facts["group"], facts["floating"])
        return cls(grid, facts["dynamic"], scales)

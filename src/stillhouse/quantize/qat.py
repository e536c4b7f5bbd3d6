"""Training with rounded weights: every step computes on the grid, and updates the latent weights.

The gradient at the rounded weights is applied to the unrounded ones (straight-through estimator,
Bengio et al. 2013, arXiv 1308.3432). No layer is replaced: before a step's forward passes the
weights are put on the grid; before the optimizer updates them they are restored. So the model stays
a plain transformers model, a tied head is rounded with its embedding, and a checkpoint holds the
latent weights, from which training resumes exactly.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback

from stillhouse.processes import local_part, part_like
from stillhouse.quantize.grid import on_grid
from stillhouse.quantize.input_rounding import round_inputs
from stillhouse.quantize.quantization import Quantization


class RoundedWeights(TrainerCallback):
    """Rounds weights with fixed scales: training changes what each number is rounded to."""

    def __init__(self, quantization: Quantization) -> None:
        self.quantization = quantization
        self._latent: dict[str, Tensor] = {}
        self._scales: dict[str, Tensor] = {}
        self._hooks: list[RemovableHandle] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._hooks = round_inputs(self.quantization, kwargs["model"].student)
        parameters = dict(kwargs["model"].student.named_parameters())
        self._scales = {
            name: part_like(scales_OG.to(parameters[name].device), parameters[name])
            for name, scales_OG in self.quantization.scales.items()
        }

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._round(kwargs["model"])

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._restore(kwargs["model"])

    @contextmanager
    def as_shipped(self, model: Any) -> Iterator[None]:
        """In the block, the weights are on the grid: what the student writes during training is
        what it would write after it."""
        self._round(model)
        try:
            yield
        finally:
            self._restore(model)

    def _round(self, model: Any) -> None:
        assert not self._latent, "a step began twice"
        for name, weight in self._weights(model):
            self._latent[name] = weight.clone()
            weight.copy_(on_grid(weight, self._scales[name], self.quantization.grid))

    def _restore(self, model: Any) -> None:
        for name, weight in self._weights(model):
            weight.copy_(self._latent.pop(name))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for hook in self._hooks:
            hook.remove()

    def _weights(self, model: Any) -> list[tuple[str, Tensor]]:
        """What this process has of each: whole rows, so that each has its own scales."""
        weights = dict(model.student.named_parameters())
        return [(name, local_part(weights[name].detach())) for name in self.quantization.scales]

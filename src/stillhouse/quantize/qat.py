"""Quantization-aware training: compute with rounded weights, and update the latent weights.

The gradient with respect to the rounded weights is applied to the latent ones (straight-through
estimator, Bengio et al. 2013, arXiv 1308.3432). No layer is replaced: weights are rounded before a
step's forward passes, and restored before the optimizer updates them. So the model stays a plain
transformers model, a tied head is rounded with its embedding, and a checkpoint contains the latent
weights, from which training resumes exactly.
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
from stillhouse.quantize.quantization import Quantization


class RoundedWeights(TrainerCallback):
    """Rounds weights with fixed scales; training only changes which grid point each weight rounds
    to."""

    def __init__(self, quantization: Quantization) -> None:
        self.quantization = quantization
        self._latent: dict[str, Tensor] = {}
        self._scales: dict[str, Tensor] = {}
        self._hooks: list[RemovableHandle] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._hooks = self.quantization.round_inputs(kwargs["model"].student)
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
        """Within the context, round the weights, so that the student generates text during training
        as it would once quantized."""
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
        """This process's part of each weight: whole rows, so that each row has its scales."""
        weights = dict(model.student.named_parameters())
        return [(name, local_part(weights[name].detach())) for name in self.quantization.scales]

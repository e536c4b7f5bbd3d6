"""Training with rounded weights: every step computes on the grid, and updates the latent weights.

The gradient at the rounded weights is applied to the unrounded ones (straight-through estimator,
Bengio et al. 2013, arXiv 1308.3432). No layer is replaced: before a step's forward passes the
weights are put on the grid; before the optimizer updates them they are restored. So the model stays
a plain transformers model, a tied head is rounded with its embedding, and a checkpoint holds the
latent weights, from which training resumes exactly.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback

from stillhouse.quantize.grid import on_grid
from stillhouse.quantize.input_rounding import round_inputs
from stillhouse.quantize.quantization import Quantization


class RoundedWeights(TrainerCallback):
    """Rounds weights with fixed scales: training changes what each number is rounded to."""

    def __init__(self, quantization: Quantization) -> None:
        self.quantization = quantization
        self._latent: dict[str, Tensor] = {}
        self._hooks: list[RemovableHandle] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._hooks = round_inputs(self.quantization, kwargs["model"].student)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert not self._latent, "a step began twice"
        for name, weight in self._weights(kwargs["model"]):
            self._latent[name] = weight.detach().clone()
            scales_OG = self.quantization.scales[name].to(weight.device)
            weight.data.copy_(on_grid(weight, scales_OG, self.quantization.grid))

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for name, weight in self._weights(kwargs["model"]):
            weight.data.copy_(self._latent.pop(name))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for hook in self._hooks:
            hook.remove()

    def _weights(self, model: Any) -> list[tuple[str, nn.Parameter]]:
        weights = dict(model.student.named_parameters())
        return [(name, weights[name]) for name in self.quantization.scales]

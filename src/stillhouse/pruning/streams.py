"""The calibration rows on their way through a model, one layer at a time.

Shapes: R windows of a batch, L tokens, D hidden width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from stillhouse.pruning.axes import Axes
from stillhouse.pruning.calibrate import (
    Batch,
    LayerInputs,
    add_ffn,
    after_attention,
    ffn_activations,
    products,
    run_ffn,
)
from stillhouse.teachers.activations import decoder_layers

Stream = list[Tensor]
"""The residual stream [R, L, D] of every batch, at one place of the model."""


@dataclass(frozen=True)
class Streams:
    """The calibration rows inside one model: batches, what its layers get, and how to run them."""

    model: Any
    axes: Axes
    batches: Sequence[Batch]
    inputs: Sequence[LayerInputs]
    dtype: Any

    @property
    def layers(self) -> nn.ModuleList:
        return decoder_layers(self.model)

    def start(self) -> Stream:
        return [one.hidden_RLD for one in self.inputs]

    def tokens(self) -> int:
        return sum(batch.input_ids_RL.numel() for batch in self.batches)

    def after_attention(self, layer: nn.Module, index: int, stream: Stream) -> Stream:
        """The stream of every batch between a layer's attention and its FFN."""
        with products(self.model, self.dtype):
            return [
                after_attention(layer, self.axes, hidden_RLD, one.extras[index])
                for hidden_RLD, one in zip(stream, self.inputs, strict=True)
            ]

    def after_ffn(self, layer: nn.Module, mids: Stream) -> Stream:
        """The stream after the layer, from that between its attention and its FFN."""
        with products(self.model, self.dtype):
            if self.axes.experts is not None:
                return [run_ffn(layer, self.axes, mid_RLD) for mid_RLD in mids]
            return [
                add_ffn(layer, self.axes, mid_RLD, ffn_activations(layer, self.axes, mid_RLD))
                for mid_RLD in mids
            ]

    def rows(self, stream: Stream) -> list[Tensor]:
        """The counted rows of every batch, [N, D] each, float32."""
        return [
            values[batch.counted_RL].float()
            for values, batch in zip(stream, self.batches, strict=True)
        ]

"""Cuts every layer to one FFN width, from the first to the last, each fed by what is cut already.

Two streams run side by side: the full model's, and that of the model as cut so far. Each layer's
down projection is refit so that the cut stream comes back towards the full one: a layer also makes
up for the layers before it, and for dropped layers right after it.

Shapes: R windows of a batch, L tokens, N rows, D hidden width, F FFN width, K kept neurons.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stillhouse.progress import bar
from stillhouse.pruning.axes import Axes, part
from stillhouse.pruning.calibrate import (
    Batch,
    LayerInputs,
    add_ffn,
    after_attention,
    ffn_activations,
    layer_inputs,
    products,
)
from stillhouse.pruning.depth import summed_kl
from stillhouse.pruning.ffn import Moments, energy_ranking, refit_and_remove
from stillhouse.pruning.surgery import keep_neurons
from stillhouse.teachers.backbone import lm_head
from stillhouse.teachers.views import decoder_layers

KL_BATCHES = 2
"""Calibration batches on which the cut model's KL is measured."""


@dataclass(frozen=True)
class _Streams:
    """The calibration rows inside one model: batches, what its layers get, and how to run them."""

    model: Any
    axes: Axes
    batches: Sequence[Batch]
    inputs: Sequence[LayerInputs]
    dtype: torch.dtype

    def after_attention(self, layer: nn.Module, index: int, stream: list[Tensor]) -> list[Tensor]:
        """The stream of every batch between a layer's attention and its FFN."""
        with products(self.model, self.dtype):
            return [
                after_attention(layer, self.axes, hidden_RLD, one.extras[index])
                for hidden_RLD, one in zip(stream, self.inputs, strict=True)
            ]

    def after_ffn(self, layer: nn.Module, mids: list[Tensor]) -> list[Tensor]:
        """The stream after the layer, from that between its attention and its FFN."""
        with products(self.model, self.dtype):
            return [
                add_ffn(layer, self.axes, mid_RLD, ffn_activations(layer, self.axes, mid_RLD))
                for mid_RLD in mids
            ]


@torch.no_grad()
def cut_width(
    model: Any,
    axes: Axes,
    batches: Sequence[Batch],
    *,
    kept_layers: Sequence[int],
    ffn_size: int,
    reconstruct: bool,
    dtype: torch.dtype,
) -> float:
    """Cuts the FFN of `kept_layers` in place; layers that will be dropped stay as they are.

    Returns KL(full ‖ cut) in nats a token on the first calibration rows (which the cut has seen).
    """
    layers = decoder_layers(model)
    inputs = [layer_inputs(model, batch) for batch in batches]
    streams = _Streams(model, axes, batches, inputs, dtype)
    full = cut = [one.hidden_RLD for one in inputs]
    tokens = sum(batch.input_ids_RL.numel() for batch in batches)
    with bar("Cutting the FFN", tokens * len(layers)) as advance:
        for index, layer in enumerate(layers):
            # The full stream leaves the layer before its weights are cut.
            full = streams.after_ffn(layer, streams.after_attention(layer, index, full))
            if index in kept_layers:
                target = full
                for following in range(index + 1, _next(kept_layers, index, len(layers))):
                    mids = streams.after_attention(layers[following], following, target)
                    target = streams.after_ffn(layers[following], mids)
                mids = streams.after_attention(layer, index, cut)
                cut = _cut_ffn(streams, layer, mids, target, ffn_size, reconstruct)
            advance(tokens)
    return _measured_kl(model, batches, full, cut)


def _next(kept_layers: Sequence[int], index: int, total: int) -> int:
    return min((kept for kept in kept_layers if kept > index), default=total)


def _cut_ffn(
    streams: _Streams,
    layer: nn.Module,
    mids: list[Tensor],
    target: list[Tensor],
    ffn_size: int,
    reconstruct: bool,
) -> list[Tensor]:
    """Cuts one layer's FFN; returns the cut stream after it."""
    axes = streams.axes
    down = part(layer, f"{axes.ffn}.{axes.down}")
    hidden, ffn = down.weight.shape
    moments = Moments.zeros(ffn, hidden, down.weight.device)
    activations: list[Tensor] = []
    for batch, mid_RLD, target_RLD in zip(streams.batches, mids, target, strict=True):
        with products(streams.model, streams.dtype):
            activations.append(ffn_activations(layer, axes, mid_RLD))
        read_NF = activations[-1][batch.counted_RL].float()
        error_ND = None
        # A norm after the FFN is no linear map, so there each layer refits to its own output.
        if axes.ffn_output_norm is None:
            wrote_ND = nn.functional.linear(read_NF, down.weight, down.bias)
            error_ND = (target_RLD - mid_RLD)[batch.counted_RL] - wrote_ND
        moments.add(read_NF, error_ND, _row_weight(target_RLD, batch))
    if reconstruct:
        kept_K, down_DK = refit_and_remove(down.weight, moments, ffn_size)
    else:
        kept_K = energy_ranking(moments.C_FF, down.weight, ffn_size)
        down_DK = down.weight[:, kept_K]
    keep_neurons(layer, axes, kept_K, down_DK)
    with products(streams.model, streams.dtype):
        return [
            add_ffn(layer, axes, mid_RLD, activations_RLF[..., kept_K])
            for mid_RLD, activations_RLF in zip(mids, activations, strict=True)
        ]


def _row_weight(target_RLD: Tensor, batch: Batch) -> Tensor:
    """1 / rms of the stream: the next norm divides by it, so that only relative errors matter.

    It also keeps a few tokens of huge norm (attention sinks) from deciding the whole refit.
    """
    return target_RLD[batch.counted_RL].square().mean(-1).clamp_min(1e-12).rsqrt()


def _measured_kl(
    model: Any, batches: Sequence[Batch], full: list[Tensor], cut: list[Tensor]
) -> float:
    norm, head = model.base_model.norm, lm_head(model)
    total, rows = 0.0, 0
    for batch, full_RLD, cut_RLD in list(zip(batches, full, cut, strict=True))[:KL_BATCHES]:
        counted_RL = batch.counted_RL
        total += summed_kl(head, norm(full_RLD)[counted_RL], [norm(cut_RLD)[counted_RL]])[0]
        rows += int(counted_RL.sum())
    return total / max(rows, 1)

"""Block-wise local distillation: what is left of a layer is trained on what the whole one did.

The layer reads the stream of the model as cut so far, and learns the full model's stream behind it,
each row divided by its rms, as the next norm divides it. No gradient leaves the layer, so this
needs the memory of one layer, and none of the head. One batch of the rows is kept aside: a layer
that training does not bring nearer to the full model on it gets its weights back.

Shapes: R windows of a batch, L tokens, N rows, D hidden width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from stillhouse.pruning.calibrate import Batch, products, run_layer
from stillhouse.pruning.streams import Stream, Streams

LEARNING_RATE = 1e-4
"""Of AdamW, falling along a cosine: see docs/pruning.md."""


def distill_block(
    streams: Streams, index: int, before: Stream, target: Stream, tokens: int
) -> float:
    """Trains one layer in place on about `tokens` tokens; the share of its error that is gone.

    before, target: the stream that the layer reads, and the one that it is to give. The error is
    that on the batch kept aside (on all rows, where there is only one batch); 0 where it did not
    fall, and the layer is as it was.
    """
    layer, batches = streams.layers[index], streams.batches
    known = {name: value.detach().clone() for name, value in layer.named_parameters()}
    judged = [len(batches) - 1]
    trained = list(range(len(batches) - 1)) or judged
    start = _error(streams, index, before, target, judged)
    layer.requires_grad_(True)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    steps = max(1, round(tokens / batches[0].input_ids_RL.numel()))
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * 0.5 * (1 + math.cos(math.pi * step / steps))
        place = trained[step % len(trained)]
        with torch.enable_grad():
            _loss(streams, index, before, target, place).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    layer.requires_grad_(False)
    after = _error(streams, index, before, target, judged)
    if after < start:
        return 1 - after / start
    for name, value in layer.named_parameters():
        value.data.copy_(known[name])
    return 0.0


@torch.no_grad()
def after_layer(streams: Streams, index: int, before: Stream) -> Stream:
    with products(streams.model, streams.dtype):
        return [
            run_layer(streams.layers[index], hidden_RLD, one.extras[index])
            for hidden_RLD, one in zip(before, streams.inputs, strict=True)
        ]


@torch.no_grad()
def _error(
    streams: Streams, index: int, before: Stream, target: Stream, places: Sequence[int]
) -> float:
    return sum(_loss(streams, index, before, target, place).item() for place in places)


def _loss(streams: Streams, index: int, before: Stream, target: Stream, place: int) -> Tensor:
    """Mean squared difference of the counted rows, each divided by the rms of its target."""
    layer: nn.Module = streams.layers[index]
    batch: Batch = streams.batches[place]
    with products(streams.model, streams.dtype):
        found_RLD = run_layer(layer, before[place], streams.inputs[place].extras[index])
    wanted_ND = target[place][batch.counted_RL].float()
    missing_ND = found_RLD[batch.counted_RL].float() - wanted_ND
    size_N1 = wanted_ND.square().mean(-1, keepdim=True).clamp_min(1e-12)
    return (missing_ND.square() / size_N1).mean()

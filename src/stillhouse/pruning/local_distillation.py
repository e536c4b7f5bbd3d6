"""Block-wise local distillation: a pruned layer is trained on the output of the original one.

The layer reads the stream of the model as cut so far, and learns the full model's stream after it,
each row divided by its rms, as the next norm divides it. No gradient leaves the layer, so this
needs the memory of one layer, and none of the head. One batch of the rows is kept aside: a layer
that training does not bring nearer to the full model on it gets its weights back.

Shapes: L tokens, N rows, D hidden width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from stillhouse.pruning.calibrate import Stream, Streams, products, run_layer

LEARNING_RATE = 1e-4
"""Of AdamW, falling along a cosine: see docs/pruning.md."""


def distill_block(
    streams: Streams, index: int, before: Stream, target: Stream, tokens: int
) -> float:
    """Train one layer in place on about `tokens` tokens; returns the share of its error that is
    gone.

    before, target: the stream that the layer reads, and the one that it should give. The error is
    that on the batch kept aside (on all rows, where there is only one batch); 0 where it did not
    fall, and the layer is as it was.
    """
    layer: nn.Module = streams.layers[index]

    def loss(place: int) -> Tensor:
        """Mean squared difference of the counted rows, each divided by the rms of its target."""
        counted_RL = streams.batches[place].counted_RL
        with products(streams.model, streams.dtype):
            found_RLD = run_layer(layer, before[place], streams.inputs[place].extras[index])
        target_ND = target[place][counted_RL].float()
        missing_ND = found_RLD[counted_RL].float() - target_ND
        size_N1 = target_ND.square().mean(-1, keepdim=True).clamp_min(1e-12)
        return (missing_ND.square() / size_N1).mean()

    known = {name: value.detach().clone() for name, value in layer.named_parameters()}
    aside = len(streams.batches) - 1
    with torch.no_grad():
        start = loss(aside).item()
    layer.requires_grad_(True)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    steps = max(1, round(tokens / streams.batches[0].input_ids_RL.numel()))
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * 0.5 * (1 + math.cos(math.pi * step / steps))
        with torch.enable_grad():
            loss(step % max(1, aside)).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    layer.requires_grad_(False)
    with torch.no_grad():
        after = loss(aside).item()
    if after < start:
        return 1 - after / start
    for name, value in layer.named_parameters():
        value.data.copy_(known[name])
    return 0.0

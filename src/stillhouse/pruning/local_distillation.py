"""Block-wise local distillation: a pruned layer is trained on the output of the original one.

The layer reads the stream of the partly cut model, and learns the full model's stream after it,
each row divided by its rms, as the next norm does. No gradient leaves the layer, so this needs
the memory of one layer, and none of the head. One batch is held out: if training does not bring
the layer closer to the full model on it, the layer's old weights are restored.

Shapes: L tokens, N rows, D hidden width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from stillhouse.pruning.calibrate import Stream, Streams, products, run_layer

LEARNING_RATE = 1e-4
"""AdamW's learning rate, with cosine decay: see docs/pruning.md."""


def distill_block(
    streams: Streams, index: int, before: Stream, target: Stream, tokens: int
) -> float:
    """Train one layer in place on about `tokens` tokens; returns the fraction of its error that
    is gone.

    before, target: the stream that the layer reads, and the one that it should return. The error
    is measured on the held-out batch (on all rows if there is only one batch). Returns 0, with the
    layer unchanged, if it did not fall.
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
    heldout = len(streams.batches) - 1
    with torch.no_grad():
        start = loss(heldout).item()
    layer.requires_grad_(True)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    steps = max(1, round(tokens / streams.batches[0].input_ids_RL.numel()))
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * 0.5 * (1 + math.cos(math.pi * step / steps))
        with torch.enable_grad():
            loss(step % max(1, heldout)).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    layer.requires_grad_(False)
    with torch.no_grad():
        after = loss(heldout).item()
    if after < start:
        return 1 - after / start
    for name, value in layer.named_parameters():
        value.data.copy_(known[name])
    return 0.0

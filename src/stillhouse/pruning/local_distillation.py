"""Block-wise local distillation: train a pruned layer on the original layer's output.

The layer reads the partly cut model's stream and learns to return the full model's stream, with
each row divided by its rms, as the next norm does. No gradient leaves the layer, so training needs
the memory of a single layer, and nothing for the head. One batch is held out; if training does not
bring the layer closer to the full model on it, the layer's old weights are restored.

Shapes: L tokens, N rows, D hidden width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from stillhouse.pruning.calibrate import Stream, Streams, products, run_layer
from stillhouse.shared_work import Empty

LEARNING_RATE = 1e-4
"""AdamW's learning rate, with cosine decay; see docs/pruning.md."""


def distill_block(
    streams: Streams, index: int, before: Stream, target: Stream, tokens: int
) -> float:
    """Train one layer in place on about `tokens` tokens; return the fraction of its error that
    training removed.

    The error is measured on the held-out batch, or, if there is only one batch, on that batch. If
    it did not fall, the layer stays unchanged, and the result is 0. The process that has a batch
    computes the gradient of its step, and all processes apply it.

    before, target: the stream that the layer reads, and the stream that it should return.
    """
    layer: nn.Module = streams.layers[index]
    batches, weights = streams.batches, list(layer.parameters())

    def loss(number: int) -> Tensor:
        """Mean squared error over the counted rows, each divided by its target's rms."""
        place = batches.numbers.index(number)
        counted_RL = streams.batches[place].counted_RL
        with products(streams.model, streams.dtype):
            found_RLD = run_layer(layer, before[place], streams.inputs[place].extras[index])
        target_ND = target[place][counted_RL].float()
        missing_ND = found_RLD[counted_RL].float() - target_ND
        size_N1 = target_ND.square().mean(-1, keepdim=True).clamp_min(1e-12)
        return (missing_ND.square() / size_N1).mean()

    def measured() -> float:
        """The loss on the held-out batch."""
        with torch.no_grad():
            (found,) = shared(heldout, lambda: [loss(heldout)], lambda: [weights[0].new_zeros(())])
        return found.item()

    def gradients(number: int) -> list[Tensor]:
        with torch.enable_grad():
            found = torch.autograd.grad(loss(number), weights, allow_unused=True)
        return [w if g is None else g for w, g in zip(unused(), found, strict=True)]

    def unused() -> list[Tensor]:
        return [torch.zeros_like(weight) for weight in weights]

    def shared(number: int, work: Callable[[], list[Tensor]], empty: Empty) -> list[Tensor]:
        processes = batches.processes
        return processes.from_owner(processes.owner(number, batches.total), work, empty)

    known = [weight.detach().clone() for weight in weights]
    heldout = batches.total - 1
    start = measured()
    layer.requires_grad_(True)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    steps = max(1, round(tokens * batches.total / batches.tokens()[0]))
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * 0.5 * (1 + math.cos(math.pi * step / steps))
        number = step % max(1, heldout)
        found = shared(number, partial(gradients, number), unused)
        for weight, gradient in zip(weights, found, strict=True):
            weight.grad = gradient
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    layer.requires_grad_(False)
    after = measured()
    if after < start:
        return 1 - after / start
    for weight, value in zip(weights, known, strict=True):
        weight.data.copy_(value)
    return 0.0

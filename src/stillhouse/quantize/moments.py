"""The importance of a matrix's inputs: the mean square of each input over text.

A row's rounding errors e change its output by e·x, and E[(e·x)²] = Σ e_i² E[x_i²] if the inputs are
uncorrelated. So a weight's error counts in proportion to its input's mean square, as in llama.cpp's
importance matrix.

Shapes: R windows, L tokens, I inputs of a layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from stillhouse.data.batches import document_bounds
from stillhouse.data.shift import text_end
from stillhouse.data.windows import WindowSet
from stillhouse.progress import bar
from stillhouse.teachers.backbone import hidden_states
from stillhouse.teachers.document_rows import separates_documents

Moments = dict[str, Tensor]


@torch.no_grad()
def input_moments(model: Any, windows: WindowSet) -> Moments:
    """Measure E[x²] of every linear layer's inputs [I] over the windows' text, without padding.

    Returns float32 tensors on the CPU, by the name of the layer's weight. The head's inputs are the
    final hidden states; a head tied to the embeddings is listed under their name.
    """
    sums: Moments = {}
    tokens = 0

    def add(name: str, inputs: Tensor) -> None:
        squares_I = inputs.detach().float().square().flatten(0, -2).sum(0)
        sums[name] = sums[name] + squares_I if name in sums else squares_I

    def add_input(name: str, _module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        add(name, inputs[0])

    head = None  # the head's first name, which is the embeddings' if it is tied to them
    if (output := model.get_output_embeddings()) is not None:
        head = next(name for name, weight in model.named_parameters() if weight is output.weight)
    device = next(model.parameters()).device
    with (
        ExitStack() as hooks,
        bar("Measuring layer inputs", len(windows), unit="windows") as advance,
    ):
        for name, module in model.base_model.named_modules(prefix=model.base_model_prefix):
            if isinstance(module, nn.Linear):
                hook = partial(add_input, f"{name}.weight")
                hooks.enter_context(module.register_forward_pre_hook(hook))
        for index in range(len(windows)):
            window = windows[index]
            end = text_end(window["labels"])
            ids_1L = window["input_ids"][None, :end].to(device)
            positions_1L = window["position_ids"][None, :end].to(device)
            for ids, positions in _alike(model, ids_1L, positions_1L):
                hidden_1LD = hidden_states(model, ids, positions)
                if head is not None:
                    add(head, hidden_1LD)
            tokens += end
            advance(1)
    return {name: (sum_I / tokens).cpu() for name, sum_I in sums.items()}


def _alike(
    model: Any, ids_1L: Tensor, positions_1L: Tensor
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Split a window into what the model can read at once without padding: the whole window, or
    each document."""
    if separates_documents(model):
        yield ids_1L, positions_1L
        return
    lengths = document_bounds(positions_1L).diff().tolist()
    yield from ((document_1L, None) for document_1L in ids_1L.split(lengths, dim=1))

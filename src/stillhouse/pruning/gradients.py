"""Gradient-based importance of a model's parts: the Fisher information of masks.

Every part (a neuron, a head, a channel of the stream, or a layer) is multiplied by a mask, which is
1. Moving the masks z away from 1 changes the output by

    KL(p ‖ p_z) ≈ ½ Σ_ij (z_i - 1) F_ij (z_j - 1),     F = E_y [∂log p(y)/∂z · ∂log p(y)/∂zᵀ],

with y drawn from the model itself: at z = 1, the KL's gradient is zero, and its curvature is F. The
diagonal of F ranks parts (Molchanov et al. 2019, arXiv 1906.10771, with the data's labels; Kwon et
al. 2022, arXiv 2204.09656, for masks). Since labels at different positions are drawn independently,
the expected square of a window's summed gradient is the sum of the positions' expected squares, so
one backward pass per batch suffices.

Shapes: R windows, L tokens, N rows, F FFN width, H heads, D hidden width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from stillhouse.objectives import Term, fused_loss
from stillhouse.progress import bar
from stillhouse.pruning.axes import Axes
from stillhouse.pruning.calibrate import OwnBatches, products
from stillhouse.pruning.reference import rows_of
from stillhouse.pruning.sizes import sizes_of
from stillhouse.signals.lm_head import head_logits
from stillhouse.teachers.activations import decoder_layers
from stillhouse.teachers.backbone import lm_head

Part = Literal["neurons", "heads", "channels", "layers"]
CHUNK = 512
"""Rows of logits that are in memory at a time."""
BATCH_TOKENS = 1024
"""Tokens per backward pass, which stores the activations of all layers."""


Fisher = dict[Part, list[Tensor]]
"""Diagonal Fisher information of masks, per token; half of it approximates the KL of losing a part.
Neurons [F], heads [H], and layers [1] have a tensor for each layer; channels have a single one [D].
"""


def mask_fisher(
    model: Any,
    axes: Axes,
    batches: OwnBatches,
    kinds: Sequence[Part],
    *,
    seed: int,
    dtype: torch.dtype,
) -> Fisher:
    """Measure the Fisher information of these kinds of masks over the batches' counted rows.

    Does not change the model's weights. Supports neurons of plain FFNs only. Each batch has its own
    seed, so that it does not matter which process draws its labels.
    """
    tokens, rows = batches.tokens()

    def terms() -> Iterator[list[Tensor]]:
        with bar("Gradients", tokens) as advance:
            for number, batch in zip(batches.numbers, batches, strict=True):
                masks = _ones(model, len(batch.input_ids_RL), kinds)
                with torch.enable_grad(), _masked(model, axes, masks), products(model, dtype):
                    rows_ND = rows_of(model, batch)
                generator = torch.Generator(device=model.device).manual_seed(seed + number)
                with torch.enable_grad():
                    loss = log_loss_of_draws(model, rows_ND, generator, dtype)
                flat = [mask for values in masks.values() for mask in values]
                yield [one.square().sum((0, 1)) for one in torch.autograd.grad(loss, flat)]
                advance(batch.input_ids_RL.numel())

    shapes = _ones(model, 1, kinds)
    flat = [mask[0, 0].detach() for values in shapes.values() for mask in values]
    found = iter(batches.sum(terms(), lambda: [torch.zeros_like(mask) for mask in flat]))
    return {kind: [next(found) / max(rows, 1) for _ in values] for kind, values in shapes.items()}


def log_loss_of_draws(
    model: Any, rows_ND: Tensor, generator: torch.Generator, dtype: torch.dtype
) -> Tensor:
    """-Σ log p(y), where y is drawn from the model's own distribution in each row."""
    head = lm_head(model)
    with torch.no_grad():
        chunks = (head_logits(head, rows_nD.float()) for rows_nD in rows_ND.split(CHUNK))
        drawn = [torch.multinomial(c.softmax(-1), 1, generator=generator)[:, 0] for c in chunks]
    terms, targets_N = (Term("cross_entropy"),), torch.cat(drawn)
    return fused_loss(rows_ND, head, terms, targets_N=targets_N, compute_dtype=dtype).total


def _ones(model: Any, windows: int, kinds: Sequence[Part]) -> dict[Part, list[Tensor]]:
    """Masks [R, 1, size], one set per window, so that each window has its own gradient."""
    sizes = sizes_of(model.config)
    shapes: dict[Part, tuple[int, int]] = {
        "neurons": (sizes.layers, sizes.ffn_size),
        "heads": (sizes.layers, sizes.heads),
        "channels": (1, sizes.hidden_size),
        "layers": (sizes.layers, 1),
    }

    def ones(count: int, size: int) -> list[Tensor]:
        shape = (windows, 1, size)
        return [torch.ones(shape, device=model.device, requires_grad=True) for _ in range(count)]

    return {kind: ones(*shapes[kind]) for kind in kinds}


@contextmanager
def _masked(model: Any, axes: Axes, masks: dict[Part, list[Tensor]]) -> Iterator[None]:
    with ExitStack() as stack:

        def hook(module: nn.Module, change: Callable[..., Any], *, before: bool) -> None:
            register = module.register_forward_pre_hook if before else module.register_forward_hook
            stack.callback(register(change).remove)

        layers: Any = decoder_layers(model)
        writers = (axes.attention_output_norm or "self_attn", axes.ffn_output_norm or "mlp")
        for number, layer in enumerate(layers):
            if "neurons" in masks:
                hook(layer.mlp.down_proj, _times_input(masks["neurons"][number]), before=True)
            if "heads" in masks:
                hook(layer.self_attn.o_proj, _times_input(masks["heads"][number]), before=True)
            if "layers" in masks:
                hook(layer, _times_added(masks["layers"][number]), before=False)
            if "channels" in masks:
                for name in writers:
                    hook(getattr(layer, name), _times_output(masks["channels"][0]), before=False)
        if "channels" in masks:
            # Masking whatever each writer adds to the stream also masks their sum exactly once.
            embedding = model.get_input_embeddings()
            hook(embedding, _times_output(masks["channels"][0]), before=False)
        yield


def _times_input(mask_R1P: Tensor) -> Callable[..., Any]:
    """Multiply the input by the mask, whose values each cover an equal part of the last
    dimension."""

    def change(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        each = args[0].shape[-1] // mask_R1P.shape[-1]
        return (args[0] * mask_R1P.repeat_interleave(each, -1), *args[1:])

    return change


def _times_output(mask_R1D: Tensor) -> Callable[..., Any]:
    def change(_: nn.Module, args: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (output[0] * mask_R1D, *output[1:])
        return output * mask_R1D

    return change


def _times_added(mask_R11: Tensor) -> Callable[..., Any]:
    """Multiply the layer's contribution to the stream by the mask."""

    def change(_: nn.Module, args: tuple[Tensor, ...], output: Any) -> Any:
        after = output[0] if isinstance(output, tuple) else output
        masked = args[0] + (after - args[0]) * mask_R11
        return (masked, *output[1:]) if isinstance(output, tuple) else masked

    return change

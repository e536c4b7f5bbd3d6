"""Checks that a fast attention kernel matches PyTorch's SDPA with a mask on this device.

Shapes: T tokens of a batch, H query heads, G key-value heads, E head width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import MistralConfig, MistralModel

FLEX, SDPA = "flex_attention", "sdpa"
TOLERANCE = 0.03
"""Largest relative error of outputs and gradients in 16 bits."""
WINDOWS = None, 5
"""Sliding-window lengths to check; None: no window."""
LONGER_WINDOWS = None, 150
"""For flex attention, which divides the tokens into blocks of 128."""
Kernel = Callable[..., Tensor]


@dataclass(frozen=True)
class Heads:
    """Shape, dtype, and device of an attention layer's heads. groups: key-value heads."""

    device: torch.device
    dtype: torch.dtype
    heads: int
    groups: int
    width: int


def problem_of_kernel(kernel: Kernel, heads: Heads) -> str | None:
    """Why the kernel cannot be used for these heads; None if it matches SDPA forward and backward,
    with and without a sliding window."""
    return _problem(kernel_error(kernel, heads, window) for window in WINDOWS)


def problem_of_flex(heads: Heads) -> str | None:
    """Like `problem_of_kernel`, for transformers' flex attention with its own masks."""
    return _problem(model_error(FLEX, heads, window) for window in LONGER_WINDOWS)


def _problem(errors: Iterable[float]) -> str | None:
    try:
        error = max(errors)
    except Exception as failure:  # compilers raise many types
        return f"fails ({str(failure).strip().partition(chr(10))[0]})"
    return None if error <= TOLERANCE else f"is off by {error:.2g}"


def kernel_error(kernel: Kernel, heads: Heads, window: int | None) -> float:
    """The largest relative difference between the kernel and SDPA with a mask, in outputs and
    gradients, on random rows of three documents."""
    lengths = (17, 1, 30)
    generator = torch.Generator().manual_seed(0)
    rows = [
        torch.randn(sum(lengths), n, heads.width, generator=generator)
        .to(heads.device, heads.dtype)
        .requires_grad_()
        for n in (heads.heads, heads.groups, heads.groups)
    ]
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(heads.device, torch.int32)
    given = {
        "scale": heads.width**-0.5,
        "window_size": (-1 if window is None else window - 1, 0),
        "enable_gqa": heads.heads != heads.groups,
    }
    results = []
    runs: tuple[Kernel, Kernel] = (kernel, masked_attention)
    for run in runs:
        out_THE = run(*rows, bounds, bounds, 30, 30, **given)
        results.append([out_THE, *torch.autograd.grad(out_THE.float().square().sum(), rows)])
    return _largest_gap(*results)


def model_error(attention: str, heads: Heads, window: int | None) -> float:
    """Like `kernel_error`, for one of transformers' attention implementations, in a random model
    with one layer. Two of the documents are longer than a block of flex attention."""
    config = MistralConfig(
        vocab_size=16,
        hidden_size=32,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=heads.heads,
        num_key_value_heads=heads.groups,
        head_dim=heads.width,
        sliding_window=window,
        initializer_range=0.2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = MistralModel(config).to(heads.device, heads.dtype)
    model.train()
    positions_1T = torch.cat([torch.arange(length) for length in (140, 1, 243)])[None]
    positions_1T = positions_1T.to(heads.device)
    ids_1T = positions_1T * 7 % 16
    results = []
    for kind in (attention, SDPA):
        model.set_attn_implementation(kind)
        out = model(input_ids=ids_1T, position_ids=positions_1T, use_cache=False)
        hidden_1TD = out.last_hidden_state.float()
        weights = [each for name, each in model.named_parameters() if "self_attn" in name]
        results.append([hidden_1TD, *torch.autograd.grad(hidden_1TD.pow(3).sum(), weights)])
    return _largest_gap(*results)


def _largest_gap(found: list[Tensor], wanted: list[Tensor]) -> float:
    """The largest relative difference between corresponding tensors, by their norms."""
    gaps = [
        ((ours.float() - theirs.float()).norm() / theirs.float().norm()).item()
        for ours, theirs in zip(found, wanted, strict=True)
    ]
    return max(gaps)


def masked_attention(
    query_THE: Tensor,
    key_TGE: Tensor,
    value_TGE: Tensor,
    bounds: Tensor,
    _bounds: Tensor,
    _longest_query: int,
    _longest_key: int,
    *,
    scale: float,
    window_size: tuple[int, int],
    enable_gqa: bool,
) -> Tensor:
    """Reference for the kernel: SDPA with a mask over all pairs of the T tokens."""
    place_T = torch.arange(len(query_THE), device=query_THE.device)
    document_T = torch.bucketize(place_T, bounds.long(), right=True)
    back_TT = place_T[:, None] - place_T
    mask_TT = (document_T[:, None] == document_T) & (back_TT >= 0)
    if window_size[0] >= 0:
        mask_TT &= back_TT <= window_size[0]
    query_1HTE, key_1GTE, value_1GTE = (
        each.transpose(0, 1)[None] for each in (query_THE, key_TGE, value_TGE)
    )
    out_1HTE = F.scaled_dot_product_attention(
        query_1HTE, key_1GTE, value_1GTE, mask_TT, scale=scale, enable_gqa=enable_gqa
    )
    return out_1HTE[0].transpose(0, 1)

"""Attention inside each document of packed windows, on GPUs.

Shapes: R windows, L tokens, T = R·L tokens of a batch, S documents, H query heads, G key-value
heads, E head width.

For packed windows, PyTorch's SDPA gets a dense mask [R, 1, L, L]: it multiplies all L² pairs and
cannot use its flash attention. PyTorch's flash attention for sequences of different lengths gets
the bounds of the T tokens' documents instead, and multiplies only the pairs inside a document.
Where this torch lacks it, flex attention skips the blocks of the mask that are empty.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.utils import is_torch_flex_attn_available

from stillhouse.data.batches import document_bounds
from stillhouse.errors import ModelError
from stillhouse.progress import note
from stillhouse.teachers.short_attention import use_short_attention

NAME = "stillhouse_packed"
FLEX = "flex_attention"
WIDEST_HEAD = 256
LEAST_CAPABILITY = 8, 0
TOLERANCE = 0.03
"""Of outputs and gradients in 16 bits, relative, before a kernel is used for a model."""
Kernel = Callable[..., Tensor]


def use_attention(model: Any, context: int, device: torch.device, dtype: torch.dtype) -> str:
    """Choose a model's attention for windows of `context` tokens; returns its name.

    On a CPU: see `use_short_attention`. On an NVIDIA GPU, in 16 bits: `packed_attention`, or flex
    attention. Otherwise PyTorch's SDPA. Attention that is none of these is not changed.
    device: where the model will run. dtype: of its products.
    """
    if model.config._attn_implementation in (NAME, FLEX):
        model.set_attn_implementation("sdpa")
    use_short_attention(model, context, device)
    if model.config._attn_implementation == "sdpa":
        chosen = _instead_of_sdpa(model, device, dtype)
        if chosen != "sdpa":
            AttentionInterface.register(NAME, packed_attention)
            AttentionMaskInterface.register(NAME, sdpa_mask)
            model.set_attn_implementation(chosen)
    return str(model.config._attn_implementation)


def document_arguments(
    model: Any, input_ids_RL: Tensor, position_ids_RL: Tensor | None, bounds: Tensor | None
) -> dict[str, Any]:
    """Arguments with which the model's backbone passes document bounds to `packed_attention`; none
    if its attention is another.

    bounds: `document_bounds`; None: they are computed here, which waits for the device.
    """
    if model.config._attn_implementation != NAME:
        return {}
    R, L = input_ids_RL.shape
    if position_ids_RL is None:
        bounds = torch.arange(0, R * L + 1, L, dtype=torch.int32, device=input_ids_RL.device)
    elif bounds is None:
        bounds = document_bounds(position_ids_RL)
    return {
        # transformers takes a mask of four dimensions as it is, and makes none of its own.
        "attention_mask": input_ids_RL.new_ones(1, 1, 1, 1, dtype=torch.bool),
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": L,
        "max_length_k": L,
    }


def packed_attention(
    module: Any,
    query_RHLE: Tensor,
    key_RGLE: Tensor,
    value_RGLE: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    cu_seq_lens_q: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Causal attention inside documents, as [R, L, H, E]; without their bounds, as in generation,
    PyTorch's SDPA."""
    R, H, L, E = query_RHLE.shape
    if cu_seq_lens_q is None:
        if attention_mask is not None and attention_mask.shape[-1] < key_RGLE.shape[2]:
            raise ModelError(
                f"{type(module).__name__} does not pass the bounds of documents to its attention",
                fix="report this model: Stillhouse must not choose packed attention for it",
            )
        return sdpa_attention_forward(
            module,
            query_RHLE,
            key_RGLE,
            value_RGLE,
            attention_mask,
            dropout=dropout,
            scaling=scaling,
            sliding_window=sliding_window,
            **kwargs,
        )
    kernel = varlen_kernel()
    assert kernel is not None
    query_THE, key_TGE, value_TGE = (
        # Under autocast, rotation may leave queries and keys in float32.
        each.to(value_RGLE.dtype).transpose(1, 2).reshape(R * L, -1, each.shape[-1])
        for each in (query_RHLE, key_RGLE, value_RGLE)
    )
    out_THE = kernel(
        query_THE,
        key_TGE,
        value_TGE,
        cu_seq_lens_q,
        cu_seq_lens_q,
        L,
        L,
        scale=E**-0.5 if scaling is None else scaling,
        window_size=(-1 if sliding_window is None else sliding_window - 1, 0),
        enable_gqa=key_RGLE.shape[1] != H,
    )
    return out_THE.view(R, L, H, -1), None


def varlen_kernel() -> Kernel | None:
    """`torch.nn.attention.varlen.varlen_attn`; None if this torch has none for grouped heads."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    kernel: Any = varlen_attn
    known = inspect.signature(kernel).parameters
    return kernel if {"enable_gqa", "window_size", "scale"} <= known.keys() else None


def _instead_of_sdpa(model: Any, device: torch.device, dtype: torch.dtype) -> str:
    config = model.config.get_text_config()
    dropout = getattr(config, "attention_dropout", None)
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16) or dropout:
        return "sdpa"
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    shape = heads, getattr(config, "num_key_value_heads", None) or heads, width
    if _passes_bounds(model) and width <= WIDEST_HEAD and kernel_agrees(device, dtype, *shape):
        return NAME
    flex = getattr(model, "_supports_flex_attn", False) and is_torch_flex_attn_available()
    return FLEX if flex and width >= 16 and width & (width - 1) == 0 else "sdpa"


def _passes_bounds(model: Any) -> bool:
    """Whether the model passes what flash attention needs to its attention, and needs no more."""
    config = model.config.get_text_config()
    if not getattr(model, "_supports_flash_attn", False):
        return False
    if any(getattr(config, name, None) for name in ("attn_logit_softcapping", "v_head_dim")):
        return False
    attention = [m for n, m in model.named_modules() if n.endswith("self_attn")]
    forwards = [model.base_model.forward, *(each.forward for each in attention[:1])]
    kinds = [{p.kind for p in inspect.signature(f).parameters.values()} for f in forwards]
    return bool(attention) and all(inspect.Parameter.VAR_KEYWORD in each for each in kinds)


@cache
def kernel_agrees(
    device: torch.device, dtype: torch.dtype, heads: int, groups: int, width: int
) -> bool:
    """Whether the kernel runs on the device for such heads, and gives what SDPA with a mask gives,
    with and without a sliding window, forward and backward."""
    kernel = varlen_kernel()
    if kernel is None or not torch.cuda.is_available():
        return False
    if torch.cuda.get_device_capability(device) < LEAST_CAPABILITY:
        return False
    try:
        error = max(kernel_error(kernel, device, dtype, heads, groups, width, w) for w in (None, 5))
    except (RuntimeError, ValueError, TypeError) as failure:
        note(f"packed windows use SDPA: torch's flash attention fails ({failure})")
        return False
    if not error <= TOLERANCE:
        note(f"packed windows use SDPA: torch's flash attention is off by {error:.2g}")
    return error <= TOLERANCE


def kernel_error(
    kernel: Kernel,
    device: torch.device,
    dtype: torch.dtype,
    heads: int,
    groups: int,
    width: int,
    window: int | None,
) -> float:
    """The largest relative difference between the kernel and SDPA with a mask, in outputs and
    gradients, on random rows of three documents."""
    lengths = (17, 1, 30)
    generator = torch.Generator().manual_seed(0)
    rows = [
        torch.randn(sum(lengths), n, width, generator=generator).to(device, dtype).requires_grad_()
        for n in (heads, groups, groups)
    ]
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)
    left = -1 if window is None else window - 1
    given = {"scale": width**-0.5, "window_size": (left, 0), "enable_gqa": heads != groups}
    results = []
    runs: tuple[Kernel, Kernel] = (kernel, masked_attention)
    for run in runs:
        out_THE = run(*rows, bounds, bounds, 30, 30, **given)
        results.append([out_THE, *torch.autograd.grad(out_THE.float().square().sum(), rows)])
    gaps = [
        ((found.float() - wanted.float()).norm() / wanted.float().norm()).item()
        for found, wanted in zip(*results, strict=True)
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
    """What the kernel computes, by a mask over all pairs of the T tokens."""
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

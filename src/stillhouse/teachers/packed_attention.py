"""Attention within each document of packed windows, on GPUs.

Shapes: R windows, L tokens, T = R·L tokens of a batch, S documents, H query heads, G key-value
heads, E head width.

With packed windows, PyTorch's SDPA gets a dense mask [R, 1, L, L], so it computes all L² pairs and
cannot use flash attention. PyTorch's variable-length flash attention gets the documents' bounds
instead, and computes only the pairs within a document. If the installed torch lacks it, flex
attention skips the empty blocks of the mask.
"""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.utils import is_torch_flex_attn_available

from stillhouse.attention_heads import head_size, key_value_heads
from stillhouse.data.batches import document_bounds
from stillhouse.errors import ModelError
from stillhouse.progress import note
from stillhouse.teachers.attention_checks import (
    FLEX,
    Heads,
    Kernel,
    problem_of_flex,
    problem_of_kernel,
)
from stillhouse.teachers.short_attention import use_short_attention

NAME = "stillhouse_packed"
WIDEST_HEAD = 256
LEAST_CAPABILITY = 8, 0


def use_attention(model: Any, context: int, device: torch.device, dtype: torch.dtype) -> str:
    """Choose a model's attention for windows of `context` tokens, and return its name.

    On a CPU: see `use_short_attention`. On an NVIDIA GPU, in 16 bits: `packed_attention` or flex
    attention. Otherwise PyTorch's SDPA. Any other attention of the model is left unchanged.
    device: where the model will run. dtype: of its matrix products.
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
    """Arguments with which the backbone passes document bounds to `packed_attention`; empty if the
    model uses a different attention.

    bounds: `document_bounds`; if None, computed here, which waits for the device.
    """
    if model.config._attn_implementation != NAME:
        return {}
    R, L = input_ids_RL.shape
    if position_ids_RL is None:
        bounds = torch.arange(0, R * L + 1, L, dtype=torch.int32, device=input_ids_RL.device)
    elif bounds is None:
        bounds = document_bounds(position_ids_RL)
    return {
        # transformers uses a 4-D mask as it is, and does not build one.
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
    """Causal attention within documents, [R, L, H, E]; PyTorch's SDPA if there are no bounds, as in
    generation."""
    R, H, L, E = query_RHLE.shape
    if cu_seq_lens_q is None:
        if attention_mask is not None and attention_mask.shape[-1] < key_RGLE.shape[2]:
            raise ModelError(
                f"{type(module).__name__} does not pass the bounds of documents to its attention",
                fix="report this model, for which Stillhouse must not choose packed attention",
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
        # Under autocast, rotary embeddings can leave queries and keys in float32.
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
    """`torch.nn.attention.varlen.varlen_attn`; None before torch 2.11."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    kernel: Any = varlen_attn
    known = inspect.signature(kernel).parameters
    if not {"window_size", "scale"} <= known.keys():
        return None
    return kernel if "enable_gqa" in known else with_repeated_heads(kernel)


def with_repeated_heads(kernel: Kernel) -> Kernel:
    """Add `enable_gqa` to a kernel from before torch 2.12 by repeating each group's keys and values
    for its query heads."""

    def attend(
        query_THE: Tensor,
        key_TGE: Tensor,
        value_TGE: Tensor,
        *bounds: Any,
        enable_gqa: bool,
        **options: Any,
    ) -> Tensor:
        if enable_gqa:
            times = query_THE.shape[1] // key_TGE.shape[1]
            key_TGE, value_TGE = (each.repeat_interleave(times, 1) for each in (key_TGE, value_TGE))
        return kernel(query_THE, key_TGE, value_TGE, *bounds, **options)

    return attend


def _instead_of_sdpa(model: Any, device: torch.device, dtype: torch.dtype) -> str:
    config = model.config.get_text_config()
    # Dropout, or DeepSeek's values, whose width differs from that of the keys.
    needs_sdpa = any(getattr(config, name, None) for name in ("attention_dropout", "v_head_dim"))
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16) or needs_sdpa:
        return "sdpa"
    heads, groups, width = config.num_attention_heads, key_value_heads(config), head_size(config)
    flash = _passes_bounds(model) and width <= WIDEST_HEAD
    flex = getattr(model, "_supports_flex_attn", False) and is_torch_flex_attn_available()
    flex = flex and width >= 16 and width & (width - 1) == 0
    return working_attention(Heads(device, dtype, heads, groups, width), flash=flash, flex=flex)


@cache
def working_attention(heads: Heads, *, flash: bool, flex: bool) -> str:
    """The first of packed attention, flex attention, and SDPA that works on the device for these
    heads. Prints a note about those that do not work.

    flash, flex: whether the model supports packed attention and flex attention.
    """
    kernel, problems, chosen = varlen_kernel(), list[str](), "sdpa"
    if flash and kernel is not None and _is_new_enough(heads.device):
        problem = problem_of_kernel(kernel, heads)
        if problem is None:
            return NAME
        problems.append(f"torch's flash attention {problem}")
    if flex:
        problem = problem_of_flex(heads)
        if problem is None:
            chosen = FLEX
        else:
            problems.append(f"flex attention {problem}")
    if problems:
        shown = "flex attention" if chosen == FLEX else "SDPA"
        note(f"packed windows use {shown}: {'; '.join(problems)}")
    return chosen


def _is_new_enough(device: torch.device) -> bool:
    return torch.cuda.is_available() and (
        torch.cuda.get_device_capability(device) >= LEAST_CAPABILITY
    )


def _passes_bounds(model: Any) -> bool:
    """Whether the model passes document bounds on to its attention, and flash attention does all
    that it needs."""
    config = model.config.get_text_config()
    if not getattr(model, "_supports_flash_attn", False):
        return False
    if getattr(config, "attn_logit_softcapping", None):
        return False
    attention = [m for n, m in model.named_modules() if n.endswith("self_attn")]
    forwards = [model.base_model.forward, *(each.forward for each in attention[:1])]
    kinds = [{p.kind for p in inspect.signature(f).parameters.values()} for f in forwards]
    return bool(attention) and all(inspect.Parameter.VAR_KEYWORD in each for each in kinds)

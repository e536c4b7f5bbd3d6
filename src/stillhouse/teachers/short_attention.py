"""Attention for short training windows on a CPU, by plain matrix products.

Shapes: R windows, H query heads, G key-value heads, J = H / G, B = R·G, M = J·L, L tokens, E width
of queries and keys, W width of values (equal to E, except in DeepSeek's latent attention).

PyTorch's fused attention for CPUs is designed for long sequences. At 256 tokens, its forward and
backward passes take 2.2 times as long as plain products, a difference of a tenth of the training
step. The products need [R, H, L, L] probabilities, so long windows use PyTorch's attention.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, eager_mask

from stillhouse.cpu_products import batched_gradients, batched_product

NAME = "stillhouse_short"
LONGEST = 512
"""Longest window in tokens. Beyond it, the memory for probabilities outweighs the time saved."""


def use_short_attention(model: Any, context: int, device: torch.device) -> bool:
    """Choose `short_attention` for short windows on a CPU, or else PyTorch's attention.

    device: where the model will run; a wrapper may not have moved it there yet.
    Returns whether `short_attention` is used. Any other attention of the model is left unchanged.
    """
    current = model.config._attn_implementation
    if current not in ("sdpa", NAME):
        return False
    short = device.type == "cpu" and context <= LONGEST
    AttentionInterface.register(NAME, short_attention)
    AttentionMaskInterface.register(NAME, eager_mask)
    chosen = NAME if short else "sdpa"
    if chosen != current:
        model.set_attn_implementation(chosen)
    return short


def short_attention(
    module: Any,
    query_RHLE: Tensor,
    key_RGLE: Tensor,
    value_RGLW: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """softmax(scale · Q Kᵀ + mask) V, [R, L, H, W], with one product for a group's query heads."""
    R, H, L, E = query_RHLE.shape
    G = key_RGLE.shape[1]
    if attention_mask is None or dropout or key_RGLE.shape[2] != L:
        return sdpa_attention_forward(
            module,
            query_RHLE,
            key_RGLE,
            value_RGLW,
            attention_mask,
            dropout=dropout,
            scaling=scaling,
            **kwargs,
        )
    scale = E**-0.5 if scaling is None else scaling
    # Under autocast, rotary embeddings leave queries and keys in float32; values have the dtype.
    dtype = value_RGLW.dtype
    with torch.autocast(query_RHLE.device.type, enabled=False):
        # A group's query heads are neighbors, so [R, H, L, E] is [R·G, J·L, E].
        query_BME = (query_RHLE * scale).to(dtype).reshape(R * G, -1, E)
        key_BLE = key_RGLE.to(dtype).reshape(R * G, L, E)
        value_BLW = value_RGLW.reshape(R * G, L, -1)
        out_BMW = _Attention.apply(query_BME, key_BLE, value_BLW, attention_mask.to(dtype))
    return out_BMW.view(R, H, L, -1).transpose(1, 2), None


class _Attention(torch.autograd.Function):
    """softmax(Q Kᵀ + mask) V. The backward pass recomputes the probabilities."""

    @staticmethod
    def forward(
        ctx: Any, query_BME: Tensor, key_BLE: Tensor, value_BLW: Tensor, mask_RHLL: Tensor
    ) -> Tensor:
        ctx.save_for_backward(query_BME, key_BLE, value_BLW, mask_RHLL)
        probabilities_BML = _probabilities(query_BME, key_BLE, mask_RHLL)
        return batched_product(probabilities_BML, value_BLW.mT)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BMW: Tensor) -> tuple[Tensor | None, ...]:
        query_BME, key_BLE, value_BLW, mask_RHLL = ctx.saved_tensors
        probabilities_BML = _probabilities(query_BME, key_BLE, mask_RHLL)
        grad_BML, grad_value_BWL = batched_gradients(grad_BMW, probabilities_BML, value_BLW.mT)
        grad_BML = torch._softmax_backward_data(
            grad_BML, probabilities_BML, -1, probabilities_BML.dtype
        )
        grad_query_BME, grad_key_BLE = batched_gradients(grad_BML, query_BME, key_BLE)
        return grad_query_BME, grad_key_BLE, grad_value_BWL.mT, None


def _probabilities(query_BME: Tensor, key_BLE: Tensor, mask_RHLL: Tensor) -> Tensor:
    """softmax(Q Kᵀ + mask), [B, M, L]."""
    scores_BML = batched_product(query_BME, key_BLE)
    R, L = len(mask_RHLL), scores_BML.shape[-1]
    scores_BML.view(R, -1, L, L).add_(mask_RHLL)
    return scores_BML.softmax(-1)

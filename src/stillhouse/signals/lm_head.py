"""From hidden rows to logits. Shapes: N rows, D hidden width, V vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor

from stillhouse.signals.signal_types import LMHead


def head_logits(head: LMHead, hidden_ND: Tensor) -> Tensor:
    """softcap(scale · (h Wᵀ + b)) as [N, V], in float32 or wider: all of it, so for few rows.

    The product is taken in the head's dtype.
    """
    hidden_ND = hidden_ND.to(head.weight_VD.dtype)
    logits_NV = torch.nn.functional.linear(hidden_ND, head.weight_VD, head.bias_V)
    logits_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
    if head.scale != 1.0:
        logits_NV = logits_NV * head.scale
    if head.softcap is not None:
        logits_NV = logits_NV.div_(head.softcap).tanh_().mul_(head.softcap)
    return logits_NV

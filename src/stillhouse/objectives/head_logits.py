"""The LM head inside the fused loss: logits of a chunk of rows, and the way back.

Shapes: n rows of a chunk, D hidden width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stillhouse.objectives.products import product_
from stillhouse.signals import LMHead


@dataclass(frozen=True)
class ComputeHead:
    """An LM head, trimmed to V rows and cast once to the dtype of the matrix products."""

    weight_VD: Tensor
    bias_V: Tensor | None
    scale: float
    softcap: float | None

    @classmethod
    def of(cls, head: LMHead, vocab_size: int, dtype: torch.dtype) -> ComputeHead:
        bias = head.bias_V
        return cls(
            head.weight_VD.detach()[:vocab_size].to(dtype),
            None if bias is None else bias.detach()[:vocab_size],
            float(head.scale),
            None if head.softcap is None else float(head.softcap),
        )

    def raw_logits(self, hidden_nD: Tensor, out_nV: Tensor) -> None:
        """h Wᵀ, in the compute dtype; bias, scale and cap follow in `finish_`."""
        product_(out_nV, hidden_nD, self.weight_VD)

    def finish_(self, logits_nV: Tensor) -> None:
        """Turns raw logits into the model's logits, in place, in the dtype of reductions."""
        if self.bias_V is not None:
            logits_nV.add_(self.bias_V)
        if self.scale != 1.0:
            logits_nV.mul_(self.scale)
        if self.softcap is not None:
            logits_nV.div_(self.softcap).tanh_().mul_(self.softcap)

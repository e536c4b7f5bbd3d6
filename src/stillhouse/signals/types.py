"""Signal types. Shapes: N supervised rows, D hidden width, V vocabulary."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class LMHead:
    """The last linear map of a language model: logits = softcap(scale · (h Wᵀ + b)).

    `softcap` c maps z to c·tanh(z / c) (Gemma 2); `scale` multiplies first (Cohere, Granite).
    """

    weight_VD: Tensor
    bias_V: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None


@dataclass(frozen=True)
class DenseSignal:
    """The teacher's full distribution, as hidden rows and the head that turns them to logits.

    Row n predicts the same token as row n of the student. The logits are never materialized
    for all rows at once.
    """

    hidden_ND: Tensor
    head: LMHead

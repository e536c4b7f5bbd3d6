"""What a block of rows is compared with.

Shapes: b rows of a block, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from stillhouse.signals import SampledSignal, SparseSignal

IMPOSSIBLE = -1e4
"""A logit whose probability is 0 in every dtype; −inf would give −inf · 0 = NaN."""


@dataclass(frozen=True)
class ProjectedRows:
    """A block of a frozen-head signal. score_b: Wᵀp · h, before the temperature is applied."""

    score_b: Tensor
    negative_entropy_b: Tensor


Teacher = Tensor | SparseSignal | SampledSignal | ProjectedRows | None
"""Raw logits [b, V], or a block of a stored signal; None: the data alone."""

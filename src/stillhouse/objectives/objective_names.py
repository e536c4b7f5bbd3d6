"""Names that a recipe's objective can use. Does not import torch, so that recipes load quickly."""

from __future__ import annotations

from typing import Literal

PARAMETERS: dict[str, dict[str, float]] = {
    "forward_kl": {},
    "reverse_kl": {},
    "jsd": {"beta": 0.5},
    "normalized_jsd": {"beta": 0.5},
    "skew_forward_kl": {"alpha": 0.1},
    "skew_reverse_kl": {"alpha": 0.1},
    "total_variation": {},
    "alpha_beta": {"alpha": 0.2, "beta": 0.7},
    "adaptive_kl": {"mu": 0.5},
    "cross_entropy": {},
}
"""Every divergence, with its parameters and their defaults; see `divergences` for the formulas.

Parameters lie in [0, 1], except those of `alpha_beta`, which can be larger.
"""

ChunkDistance = Literal["binary", "squared"]
"""Distances between two models' likelihoods of the same text; see `chunks` for the formulas."""
Distance = Literal["mse", "cosine"]
"""Distances between hidden states."""
LayerMapping = Literal["uniform", "last"]
Relation = Literal["query", "key", "value"]
ScheduleShape = Literal["linear", "cosine"]

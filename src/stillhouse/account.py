"""What a run costs: floating-point operations, by the usual counting rules.

A training token costs 6 FLOPs a parameter (2 forward, 4 backward) and a forward-only token 2,
embeddings counted once, as the head (Kaplan et al. 2020, arXiv 2001.08361, section 2.1).
Attention's own products are left out: they are small at the context lengths used here.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class ParameterCount:
    """total: each stored parameter once. head_once: total, less an untied input embedding."""

    total: int
    non_embedding: int
    head_once: int


def count_parameters(model: nn.Module) -> ParameterCount:
    """Counts a causal language model's parameters; a tied head counts once."""
    total = sum(parameter.numel() for parameter in model.parameters())
    embedding = model.get_input_embeddings().weight  # type: ignore[operator]
    head = model.get_output_embeddings()  # type: ignore[operator]
    tied = head is None or head.weight is embedding
    head_size = 0 if tied else head.weight.numel()
    return ParameterCount(
        total=total,
        non_embedding=total - embedding.numel() - head_size,
        head_once=total if tied else total - embedding.numel(),
    )


def distillation_flops(student: int, teacher: int, tokens: int) -> int:
    """FLOPs of `tokens` distillation tokens; parameters counted as `head_once`."""
    return (6 * student + 2 * teacher) * tokens


def training_flops(student: int, tokens: int) -> int:
    """FLOPs of `tokens` plain training tokens."""
    return 6 * student * tokens


def forward_flops(parameters: int, tokens: int) -> int:
    return 2 * parameters * tokens

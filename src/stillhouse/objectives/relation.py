"""Self-attention relation distillation (MiniLMv2, Wang et al. 2021, arXiv 2012.15828).

A relation is softmax(X Xᵀ / √d) over positions, where X is one layer's queries, keys, or values,
split into relation heads of width d. Its shape depends on neither the width nor the number of
attention heads, so student and teacher can differ in both.

Shapes: R windows, L positions, A relation heads, W width of a projection's output.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, get_args

import torch
from torch import Tensor, nn

from stillhouse.errors import SignalError
from stillhouse.objectives.objective_names import Relation
from stillhouse.objectives.terms import LossSum

RELATIONS: tuple[Relation, ...] = get_args(Relation)
PROJECTIONS = {"query": "q_proj", "key": "k_proj", "value": "v_proj"}
FUSED = "qkv_proj"
"""All three in one projection (Phi-3)."""


AttentionStates = dict[str, Tensor]
"""Outputs [R, L, W] of one layer's projections, before rotary embeddings, with heads concatenated.
Keys: see `RELATIONS`."""


@contextmanager
def capture(attention: nn.Module) -> Iterator[AttentionStates]:
    """Capture the outputs of an attention layer's q, k, and v projections within the context.

    Raises SignalError if the layer does not have these projections.
    """
    require_projections(attention)
    caught: AttentionStates = {}

    def keep(name: str, _module: nn.Module, _inputs: object, output: Tensor) -> None:
        caught[name] = output

    def divide(_module: nn.Module, _inputs: object, output: Tensor) -> None:
        output_projection: Any = attention.get_submodule("o_proj")
        query = output_projection.in_features
        key = (output.shape[-1] - query) // 2
        caught.update(zip(RELATIONS, output.split([query, key, key], -1), strict=True))

    if isinstance(fused := getattr(attention, FUSED, None), nn.Module):
        handles = [fused.register_forward_hook(divide)]
    else:
        handles = [
            attention.get_submodule(PROJECTIONS[name]).register_forward_hook(partial(keep, name))
            for name in RELATIONS
        ]
    try:
        yield caught
    finally:
        for handle in handles:
            handle.remove()


def require_projections(attention: nn.Module) -> None:
    """Raise SignalError unless the attention layer has q_proj, k_proj, and v_proj, or a fused
    qkv_proj that concatenates their outputs (Phi-3)."""
    fused = [getattr(attention, name, None) for name in (FUSED, "o_proj")]
    if all(isinstance(projection, nn.Module) for projection in fused):
        return
    for projection in PROJECTIONS.values():
        if not isinstance(getattr(attention, projection, None), nn.Module):
            raise SignalError(
                f"{type(attention).__name__} has no {projection}",
                where="objective.terms",
                fix="use attention relations only with models that have q_proj, k_proj, and "
                "v_proj, or a fused qkv_proj",
            )


def relation_loss(
    student: AttentionStates,
    teacher: AttentionStates,
    *,
    heads: int,
    mask_RLL: Tensor | None = None,
    positions_N: Tensor | None = None,
    relations: Sequence[str] = RELATIONS,
) -> LossSum:
    """Sum KL(teacher's relation ‖ student's) over positions, averaged over heads and relations.

    Args:
        student, teacher: one layer's states from `capture`.
        heads: number of relation heads A; must divide the width of every projection.
        mask_RLL: True where position i can be related to position j; None: causal. Use it to mask
            padding and, in packed windows, other documents.
        positions_N: indices of the positions to include, in the flattened [R, L]; None: all.
        relations: any of "query", "key", and "value".

    Raises:
        SignalError: widths cannot be split into heads, or states do not match.
    """
    first = _states("student", student, relations[0])
    windows, length = first.shape[:2]
    if mask_RLL is None:
        mask_LL = torch.ones(length, length, dtype=torch.bool, device=first.device).tril()
        mask_RLL = mask_LL.expand(windows, length, length)
    total = first.new_zeros((), dtype=torch.float32)
    values = {}
    for relation in relations:
        student_RLW = _states("student", student, relation)
        teacher_RLW = _states("teacher", teacher, relation).detach()
        if teacher_RLW.shape[:2] != student_RLW.shape[:2]:
            raise SignalError(
                f"the student's {relation} states have shape [windows, positions] "
                f"{tuple(student_RLW.shape[:2])}, but the teacher's have "
                f"{tuple(teacher_RLW.shape[:2])}",
                fix="run both models on the same windows",
            )
        log_q_RALL = _log_relation(student_RLW, heads, mask_RLL, f"student's {relation}")
        log_p_RALL = _log_relation(teacher_RLW, heads, mask_RLL, f"teacher's {relation}")
        allowed = mask_RLL[:, None]
        gap_RALL = (log_p_RALL - log_q_RALL).masked_fill(~allowed, 0.0)
        kl_RAL = (log_p_RALL.exp() * gap_RALL).sum(-1)
        kl_RL = kl_RAL.mean(1)  # 0 where every position is masked
        value = (kl_RL if positions_N is None else kl_RL.flatten()[positions_N]).sum()
        values[f"{relation} relation"] = value.detach()
        total = total + value / len(relations)
    return LossSum(total, values, windows * length if positions_N is None else len(positions_N))


def _states(name: str, states: AttentionStates, relation: str) -> Tensor:
    if relation not in RELATIONS:
        raise SignalError(
            f"unknown relation {relation!r}", fix=f"use any of {', '.join(RELATIONS)}"
        )
    if relation not in states:
        raise SignalError(
            f"the {name}'s {relation} states are missing",
            fix="run the model inside `with capture(layer.self_attn) as states`",
        )
    return states[relation]


def _log_relation(states_RLW: Tensor, heads: int, mask_RLL: Tensor, name: str) -> Tensor:
    windows, length, width = states_RLW.shape
    if width % heads:
        raise SignalError(
            f"the {name} states have width {width}, which is not a multiple of {heads} relation "
            "heads",
            fix="choose a number of heads that divides the widths of both models",
        )
    x_RALd = states_RLW.float().reshape(windows, length, heads, width // heads).transpose(1, 2)
    scores_RALL = x_RALd @ x_RALd.transpose(-1, -2) / (width // heads) ** 0.5
    # The floor is finite, so that a fully masked position gets a uniform row, not NaN.
    floor = torch.finfo(scores_RALL.dtype).min
    return torch.log_softmax(scores_RALL.masked_fill(~mask_RLL[:, None], floor), -1)

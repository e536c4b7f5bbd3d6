"""Self-attention relation transfer (MiniLMv2, Wang et al. 2021, arXiv 2012.15828).

A relation is softmax(X Xᵀ / √d) over positions, for X the queries, keys or values of one layer,
split into relation heads of width d. It has the shape of an attention map for any width and number
of heads, so student and teacher may differ in both.

Shapes: R windows, L positions, A relation heads, W width of a projection's output.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import get_args

import torch
from torch import Tensor, nn

from stillhouse.errors import SignalError
from stillhouse.objectives.objective_names import Relation
from stillhouse.objectives.terms import LossSum

RELATIONS: tuple[Relation, ...] = get_args(Relation)
PROJECTIONS = {"query": "q_proj", "key": "k_proj", "value": "v_proj"}


AttentionStates = dict[str, Tensor]
"""Outputs [R, L, W] of one layer's projections, heads side by side, before any rotation, by the
names of `RELATIONS`."""


@contextmanager
def capture(attention: nn.Module) -> Iterator[AttentionStates]:
    """Keep the outputs of an attention layer's q_proj, k_proj and v_proj inside the block.

    Raises:
        SignalError: a layer without these projections.
    """
    caught: AttentionStates = {}

    def keep(name: str) -> object:
        projection = getattr(attention, PROJECTIONS[name], None)
        if not isinstance(projection, nn.Module):
            raise SignalError(
                f"{type(attention).__name__} has no {PROJECTIONS[name]}",
                fix="relation transfer works on attention with separate q, k and v projections",
            )

        def hook(_module: nn.Module, _inputs: object, output: Tensor) -> None:
            caught[name] = output

        return projection.register_forward_hook(hook)

    handles = [keep(name) for name in RELATIONS]
    try:
        yield caught
    finally:
        for handle in handles:
            handle.remove()  # type: ignore[attr-defined]


def relation_loss(
    student: AttentionStates,
    teacher: AttentionStates,
    *,
    heads: int,
    mask_RLL: Tensor | None = None,
    positions_N: Tensor | None = None,
    relations: Sequence[str] = RELATIONS,
) -> LossSum:
    """Sum over positions of KL(teacher's relation ‖ student's), averaged over heads and relations.

    Args:
        heads: relation heads A; every projection's width must be a multiple of it.
        mask_RLL: True where position i may be related to position j. None: causal. Mask other
            documents of a packed window and padding with it.
        positions_N: the positions that count, numbered over all windows. None: all.
        relations: some of "query", "key", "value".

    Raises:
        SignalError: widths that cannot be split into heads, or states that do not match.
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
                f"the {relation} states are of {tuple(student_RLW.shape[:2])} positions in the "
                f"student and {tuple(teacher_RLW.shape[:2])} in the teacher"
            )
        log_q_RALL = _log_relation(student_RLW, heads, mask_RLL, f"student's {relation}")
        log_p_RALL = _log_relation(teacher_RLW, heads, mask_RLL, f"teacher's {relation}")
        allowed = mask_RLL[:, None]
        gap_RALL = (log_p_RALL - log_q_RALL).masked_fill(~allowed, 0.0)
        kl_RAL = (log_p_RALL.exp() * gap_RALL).sum(-1)
        kl_RL = kl_RAL.mean(1)  # 0 where no position may be related
        value = (kl_RL if positions_N is None else kl_RL.flatten()[positions_N]).sum()
        values[f"{relation} relation"] = value.detach()
        total = total + value / len(relations)
    return LossSum(total, values, windows * length if positions_N is None else len(positions_N))


def _states(name: str, states: AttentionStates, relation: str) -> Tensor:
    if relation not in RELATIONS:
        raise SignalError(
            f"unknown relation {relation!r}", fix=f"use some of {', '.join(RELATIONS)}"
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
            f"the {name} states are {width} wide: that cannot be split into {heads} relation heads",
            fix="choose a number of heads that divides the widths of both models",
        )
    x_RALd = states_RLW.float().reshape(windows, length, heads, width // heads).transpose(1, 2)
    scores_RALL = x_RALd @ x_RALd.transpose(-1, -2) / (width // heads) ** 0.5
    # A finite floor: a fully masked position gets a uniform row, not NaN.
    floor = torch.finfo(scores_RALL.dtype).min
    return torch.log_softmax(scores_RALL.masked_fill(~mask_RLL[:, None], floor), -1)

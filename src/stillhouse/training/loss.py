"""The loss of one batch: every term of the objective from one pass over each model.

Shapes: R windows, L tokens, N supervised rows, D hidden width.

Every term is a sum over the same supervised rows, so that their weighted sum is divided once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from stillhouse.data.shift import predicting, supervised_rows, supervised_targets
from stillhouse.objectives import (
    AttentionStates,
    LossSum,
    fused_loss,
    layer_logits_loss,
    relation_loss,
)
from stillhouse.signals import (
    DenseSignal,
    FrozenHeadSignal,
    HiddenSignal,
    LMHead,
    SampledSignal,
    Signal,
    SparseSignal,
)
from stillhouse.signals.decode import StoredSignal
from stillhouse.teachers.backbone import lm_head
from stillhouse.teachers.views import Views, final_norm
from stillhouse.training.objective import Objective, Weight

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class TeacherView:
    """What the teacher shows of one batch.

    signal: None where no divergence is asked for. layers: [N, D] by layer, for supervised rows.
    attention: by block.
    """

    signal: Signal | None
    layers: Mapping[int, Tensor] = field(default_factory=dict)
    attention: Mapping[int, AttentionStates] = field(default_factory=dict)


def stored_view(
    stored: StoredSignal, teacher_head: LMHead | None, device: torch.device
) -> TeacherView:
    """What a store knows of the teacher, on a device.

    teacher_head: makes the last of stored hidden states a whole distribution again.
    """
    if not isinstance(stored, HiddenSignal):
        return TeacherView(_moved(stored, device))
    layers = {layer: hidden_ND.to(device) for layer, hidden_ND in stored.hidden_ND.items()}
    signal = None if teacher_head is None else DenseSignal(layers[max(layers)], teacher_head)
    return TeacherView(signal, layers)


def _moved(
    signal: SparseSignal | SampledSignal | FrozenHeadSignal, device: torch.device
) -> SparseSignal | SampledSignal | FrozenHeadSignal:
    values = ((each.name, getattr(signal, each.name)) for each in fields(signal))
    tensors: dict[str, Any] = {n: v.to(device) for n, v in values if isinstance(v, Tensor)}
    return replace(signal, **tensors)


def objective_loss(
    objective: Objective,
    student: Any,
    seen: Views,
    teacher: TeacherView | None,
    batch: Batch,
    *,
    progress: float,
    vocabulary: int | None,
    dtype: torch.dtype,
) -> LossSum:
    """The weighted sum over the batch's supervised rows, connected to the student.

    progress: share of all steps that are done. dtype: of the head's matrix products.
    """
    labels_RL = batch["labels"]
    about: dict[str, Any] = {
        "signal": None if teacher is None else teacher.signal,
        "targets_N": supervised_targets(labels_RL),
        "vocab_size": vocabulary,
        "compute_dtype": dtype,
    }
    rows_ND = supervised_rows(seen.last_RLD, labels_RL)
    losses: list[Tensor] = []
    values: dict[str, Tensor] = {}
    if objective.output.terms:
        loss = fused_loss(rows_ND, lm_head(student), objective.output.at(progress), **about)
        losses.append(loss.total)
        values |= loss.terms
    for logits in objective.layer_logits:
        layers = {layer: supervised_rows(seen.layers[layer], labels_RL) for layer in logits.layers}
        terms = logits.term.at(progress)
        loss = layer_logits_loss(layers, final_norm(student), lm_head(student), terms, **about)
        losses.append(loss.total)
        values |= loss.terms
    if objective.hidden or objective.relations:
        assert teacher is not None
        for name, weight, total in _between(objective, seen, teacher, batch):
            losses.append(total * weight.at(progress))
            values[name] = total.detach()
    if teacher is not None and isinstance(teacher.signal, SampledSignal):
        # Samples do not know the teacher's entropy: what they give is not a divergence.
        values = {_renamed(name): value for name, value in values.items()}
    return LossSum(torch.stack([loss.float() for loss in losses]).sum(), values, len(rows_ND))


def mean_loss(losses: Sequence[LossSum]) -> LossSum:
    """The mean of one batch's losses under several teachers."""
    if len(losses) == 1:
        return losses[0]
    terms = {
        name: torch.stack([loss.terms[name] for loss in losses]).mean(0) for name in losses[0].terms
    }
    total = torch.stack([loss.total for loss in losses]).mean()
    return LossSum(total, terms, losses[0].rows)


def _renamed(name: str) -> str:
    return name.replace("forward_kl", "teacher_cross_entropy")


def _between(
    objective: Objective, student: Views, teacher: TeacherView, batch: Batch
) -> Iterable[tuple[str, Weight, Tensor]]:
    labels_RL = batch["labels"]
    for hidden in objective.hidden:
        pairs = hidden.loss.pairs
        of_student = {i: supervised_rows(student.layers[i], labels_RL) for i, _ in pairs}
        yield hidden.name, hidden.weight, hidden.loss(of_student, teacher.layers).total
    if objective.relations:
        mask_RLL = same_document(batch["position_ids"])
        predicting_RL = predicting(labels_RL)
    for term in objective.relations:
        totals = [
            relation_loss(
                student.attention[i],
                teacher.attention[j],
                heads=term.heads,
                mask_RLL=mask_RLL,
                rows_RL=predicting_RL,
                relations=term.relations,
            ).total
            for i, j in term.pairs
        ]
        yield term.name, term.weight, torch.stack(totals).mean()


def same_document(position_ids_RL: Tensor) -> Tensor:
    """[R, L, L], True where position i may see position j: not after it, and in its document."""
    document_RL = (position_ids_RL == 0).cumsum(-1)
    same_RLL = document_RL[:, :, None] == document_RL[:, None, :]
    return same_RLL.tril()

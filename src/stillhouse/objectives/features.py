"""Losses on intermediate hidden states, and maps of the layers that they compare.

Layers are indexed like `hidden_states` in transformers: 0 is the embeddings, i is the output of
block i, and the last index is the last hidden state (after the final norm).

Shapes: N supervised rows, D width (Ds of the student, Dt of the teacher).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import get_args

import torch
from torch import Tensor, nn

from stillhouse.errors import SignalError
from stillhouse.objectives.fused import fused_loss
from stillhouse.objectives.input_checks import same_rows
from stillhouse.objectives.objective_names import Distance, LayerMapping
from stillhouse.objectives.terms import LossSum, Term
from stillhouse.signals import LMHead, Signal

LayerMap = tuple[tuple[int, int], ...]
"""(student's layer, teacher's layer) pairs."""


def map_layers(
    student_layers: int,
    teacher_layers: int,
    how: LayerMapping | Sequence[tuple[int, int]] = "uniform",
    *,
    count: int | None = None,
    embeddings: bool = False,
) -> LayerMap:
    """Pair the layers to compare.

    Args:
        student_layers, teacher_layers: number of blocks of each model.
        how: "uniform" spreads the student's blocks over the teacher's depth, pairing the last with
            the last; "last" pairs the last `count` blocks of both, in order; or a list of pairs.
        count: how many blocks to pair, counted from the end; None: all of the student's ("last":
            as many as both models have).
        embeddings: also pair both models' embeddings. Ignored for a list of pairs.

    Raises:
        SignalError: a model does not have a layer, or has fewer blocks than pairs.
    """
    if student_layers < 1 or teacher_layers < 1:
        raise SignalError(
            f"a layer map needs models with at least one block, not {student_layers} and "
            f"{teacher_layers}"
        )
    if not isinstance(how, str):
        return _explicit(how, student_layers, teacher_layers)
    most = student_layers if how == "uniform" else min(student_layers, teacher_layers)
    number = most if count is None else count
    if not 1 <= number <= most:
        raise SignalError(
            f"a {how} layer map of {number} pairs does not fit {student_layers} student and "
            f"{teacher_layers} teacher blocks",
            fix=f"pair between 1 and {most} blocks",
        )
    chosen = range(student_layers - number + 1, student_layers + 1)
    if how == "uniform":
        # Round half-integers up, so that equal steps always round in the same direction.
        pairs = [(s, (2 * s * teacher_layers + student_layers) // (2 * student_layers))
                 for s in chosen]  # fmt: skip
    else:
        pairs = [(s, s - student_layers + teacher_layers) for s in chosen]
    return (((0, 0),) if embeddings else ()) + tuple(pairs)


def _explicit(
    pairs: Sequence[tuple[int, int]], student_layers: int, teacher_layers: int
) -> LayerMap:
    if not pairs:
        raise SignalError("the layer map is empty", fix="pass (student layer, teacher layer) pairs")
    for student, teacher in pairs:
        for name, layer, last in (
            ("student", student, student_layers),
            ("teacher", teacher, teacher_layers),
        ):
            if not 0 <= layer <= last:
                raise SignalError(
                    f"the {name} has no layer {layer}",
                    fix=f"use 0 for the embeddings, or 1 to {last} for the outputs of its blocks",
                )
    if len(set(pairs)) < len(pairs):
        raise SignalError("the layer map contains a pair twice", fix="remove the duplicate")
    return tuple((student, teacher) for student, teacher in pairs)


class HiddenStateLoss(nn.Module):
    """Distance between paired layers of two models, whose depths and widths can differ.

    If the widths differ, each pair has a linear map from the student's width to the teacher's
    (TinyBERT, Jiao et al. 2020, arXiv 1909.10351). The maps are parameters of this module, not of
    the student: pass them to the optimizer; they are not part of the student's checkpoint.

    kind: "mse" is the squared difference, averaged over the width; "cosine" is 1 − cosine
    similarity.
    """

    def __init__(
        self, pairs: LayerMap, student_width: int, teacher_width: int, kind: Distance = "mse"
    ) -> None:
        super().__init__()
        if kind not in get_args(Distance):
            raise SignalError(f"unknown hidden-state loss {kind!r}", fix="use mse or cosine")
        self.pairs = pairs
        self.kind = kind
        self.projections = nn.ModuleList()
        if student_width != teacher_width:
            for _ in pairs:
                self.projections.append(nn.Linear(student_width, teacher_width, bias=False))

    def forward(
        self,
        student: Sequence[Tensor] | Mapping[int, Tensor],
        teacher: Sequence[Tensor] | Mapping[int, Tensor],
        row_weights_N: Tensor | None = None,
    ) -> LossSum:
        """Average the distance over pairs, and sum it over rows.

        Args:
            student, teacher: hidden rows [N, D] by layer index, supervised rows only.
            row_weights_N: a factor for each row; None: 1.

        Raises:
            SignalError: a layer is missing, or rows or widths do not match.
        """
        values: dict[str, Tensor] = {}
        total: Tensor | None = None
        rows = 0
        for number, (of_student, of_teacher) in enumerate(self.pairs):
            student_ND = _layer("student", student, of_student)
            teacher_ND = _layer("teacher", teacher, of_teacher).detach()
            rows = len(student_ND)
            same_rows(f"the teacher's layer {of_teacher}", teacher_ND, rows)
            if self.projections:
                student_ND = self.projections[number](student_ND)
            if student_ND.shape != teacher_ND.shape:
                raise SignalError(
                    f"layer {of_student} of the student has width {student_ND.shape[1]}, but layer "
                    f"{of_teacher} of the teacher has width {teacher_ND.shape[1]}",
                    fix="build HiddenStateLoss with both models' widths",
                )
            distance_N = self._distance(student_ND.float(), teacher_ND.float())
            if row_weights_N is not None:
                distance_N = distance_N * row_weights_N
            value = distance_N.sum()
            values[f"{self.kind}@{of_student}-{of_teacher}"] = value.detach()
            total = value if total is None else total + value
        assert total is not None
        return LossSum(total / len(self.pairs), values, rows)

    def _distance(self, student_ND: Tensor, teacher_ND: Tensor) -> Tensor:
        if self.kind == "mse":
            return (student_ND - teacher_ND).square().mean(-1)
        return 1.0 - torch.cosine_similarity(student_ND, teacher_ND, dim=-1)


def _layer(name: str, layers: Sequence[Tensor] | Mapping[int, Tensor], index: int) -> Tensor:
    try:
        hidden_ND = layers[index]
    except (IndexError, KeyError):
        raise SignalError(
            f"the hidden states of the {name}'s layer {index} are missing",
            fix="run the model with output_hidden_states=True, and pass all hidden states",
        ) from None
    if hidden_ND.ndim != 2:
        raise SignalError(
            f"the hidden states of the {name}'s layer {index} have shape "
            f"{tuple(hidden_ND.shape)}; expected [rows, width]",
            fix="flatten batch and position, and keep only supervised rows",
        )
    return hidden_ND


def layer_logits_loss(
    student: Mapping[int, Tensor],
    norm: Callable[[Tensor], Tensor],
    head: LMHead,
    terms: Sequence[Term],
    *,
    signal: Signal | None = None,
    targets_N: Tensor | None = None,
    vocab_size: int | None = None,
) -> LossSum:
    """Compute the loss of next-token predictions made from intermediate layers of the student.

    Each layer's rows go through the model's final `norm` and its head; term values are named
    "forward_kl@layer3". The total is the mean over layers. See `fused_loss` for everything else.
    """
    if not student:
        raise SignalError("no layers were given", fix="pass hidden rows by layer index")
    losses = {
        layer: fused_loss(
            norm(hidden_ND),
            head,
            terms,
            signal=signal,
            targets_N=targets_N,
            scale=1.0 / len(student),
            vocab_size=vocab_size,
        )
        for layer, hidden_ND in student.items()
    }
    values = {
        f"{name}@layer{layer}": value
        for layer, loss in losses.items()
        for name, value in loss.terms.items()
    }
    total = torch.stack([loss.total for loss in losses.values()]).sum()
    return LossSum(total, values, next(iter(losses.values())).rows)

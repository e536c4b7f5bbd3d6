"""Which layer of the student is compared with which layer of the teacher.

A layer's index is that of its output in transformers' `hidden_states`: 0 is the embeddings, i the
output of block i, and the number of blocks the last hidden state (after the final norm).
"""

from __future__ import annotations

from collections.abc import Sequence

from stillhouse.errors import SignalError
from stillhouse.objectives.objective_names import LayerMapping

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
    """Pairs of layers to compare.

    Args:
        student_layers, teacher_layers: blocks of each model.
        how: "uniform" spreads the student's blocks over the teacher's depth, the last on the last;
            "last" pairs the last `count` blocks of both, in order; or a list of pairs.
        count: how many blocks to pair, counted from the end; None: all of the student's.
        embeddings: also pair the embeddings of both.

    Raises:
        SignalError: a layer that a model does not have, or more pairs than it has blocks.
    """
    if student_layers < 1 or teacher_layers < 1:
        raise SignalError(f"a layer map needs blocks, not {student_layers} and {teacher_layers}")
    if not isinstance(how, str):
        return _explicit(how, student_layers, teacher_layers)
    number = student_layers if count is None else count
    most = student_layers if how == "uniform" else min(student_layers, teacher_layers)
    if count is None and how == "last":
        number = most
    if not 1 <= number <= most:
        raise SignalError(
            f"a {how} layer map of {number} pairs does not fit {student_layers} student and "
            f"{teacher_layers} teacher blocks",
            fix=f"use 1 to {most} pairs",
        )
    chosen = range(student_layers - number + 1, student_layers + 1)
    if how == "uniform":
        # Half-integers round up, so that equal steps always round in the same direction.
        pairs = [(s, (2 * s * teacher_layers + student_layers) // (2 * student_layers))
                 for s in chosen]  # fmt: skip
    else:
        pairs = [(s, s - student_layers + teacher_layers) for s in chosen]
    return (((0, 0),) if embeddings else ()) + tuple(pairs)


def _explicit(
    pairs: Sequence[tuple[int, int]], student_layers: int, teacher_layers: int
) -> LayerMap:
    if not pairs:
        raise SignalError("the layer map is empty", fix="give (student layer, teacher layer) pairs")
    for student, teacher in pairs:
        for name, layer, last in (
            ("student", student, student_layers),
            ("teacher", teacher, teacher_layers),
        ):
            if not 0 <= layer <= last:
                raise SignalError(
                    f"the {name} has no layer {layer}",
                    fix=f"0 is the embeddings, 1 to {last} are the outputs of its blocks",
                )
    if len(set(pairs)) < len(pairs):
        raise SignalError("the layer map holds a pair twice")
    return tuple((student, teacher) for student, teacher in pairs)

"""Layer maps: which layer of the student is compared with which layer of the teacher.

Layers are indexed like `hidden_states` in transformers: 0 is the embeddings, i is the output of
block i, and the last index is the last hidden state (after the final norm).
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
    number = student_layers if count is None else count
    most = student_layers if how == "uniform" else min(student_layers, teacher_layers)
    if count is None and how == "last":
        number = most
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

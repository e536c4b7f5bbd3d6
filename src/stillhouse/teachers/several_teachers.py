"""Several teachers with the same vocabulary. The loss is the mean of the losses for each
teacher."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from stillhouse.data.batches import Batch, Batches
from stillhouse.errors import ModelError, SignalError
from stillhouse.teachers.activations import ActivationRequest
from stillhouse.teachers.teacher import OUTPUT_ONLY, Teacher, TeacherNeeds, TeacherView


class SeveralTeachers(Teacher):
    """Returns the signals of all teachers.

    Raises ModelError if there are no teachers or their vocabularies differ in size.
    """

    def __init__(self, teachers: Sequence[Teacher]) -> None:
        self.teachers = tuple(teachers)
        sizes = sorted({teacher.vocabulary for teacher in self.teachers})
        if not sizes:
            raise ModelError("the list of teachers is empty", fix="pass at least one teacher")
        if len(sizes) > 1:
            raise ModelError(
                f"{len(self.teachers)} teachers have vocabularies of {sizes} tokens",
                fix="choose teachers with the same vocabulary",
            )
        self.vocabulary = sizes[0]
        self.tokenizer, self.config = self.teachers[0].tokenizer, self.teachers[0].config
        self.described = " and ".join(teacher.described for teacher in self.teachers)
        self.fingerprint = " ".join(teacher.fingerprint for teacher in self.teachers)
        self.collective = any(teacher.collective for teacher in self.teachers)
        self.gives_chunks = any(teacher.gives_chunks for teacher in self.teachers)
        self.tokens_together = min(teacher.tokens_together for teacher in self.teachers)

    def answer(self, batch: Batch, request: ActivationRequest = OUTPUT_ONLY) -> TeacherView:
        views = [teacher.answer(batch) for teacher in self.teachers]
        return TeacherView(tuple(signal for view in views for signal in view.signals))

    def prepare(self, needs: TeacherNeeds, text: Batches | None = None) -> None:
        check_one_teacher(needs.activations)
        for teacher in self.teachers:
            teacher.prepare(needs, text)

    def place(self, device: torch.device, context: int) -> None:
        for teacher in self.teachers:
            teacher.place(device, context)

    def for_heldout(self, batches: Sequence[Batch]) -> Teacher | None:
        found = [teacher.for_heldout(batches) for teacher in self.teachers]
        known = [teacher for teacher in found if teacher is not None]
        return SeveralTeachers(known) if len(known) == len(found) else None

    def for_own_text(self) -> Teacher:
        return SeveralTeachers([teacher.for_own_text() for teacher in self.teachers])

    def flops(self, tokens: int) -> int:
        return sum(teacher.flops(tokens) for teacher in self.teachers)

    def __repr__(self) -> str:
        return f"SeveralTeachers({', '.join(map(repr, self.teachers))})"


def combined(teachers: Sequence[Teacher]) -> Teacher | None:
    """Combine the teachers into one; None if there are none."""
    return SeveralTeachers(teachers) if len(teachers) > 1 else next(iter(teachers), None)


def check_one_teacher(request: ActivationRequest) -> None:
    """Raise SignalError if activations of several teachers are requested."""
    if request:
        raise SignalError(
            "terms on intermediate layers support only one teacher, and there are several",
            where="objective.terms",
            fix="use only terms on the output, or one teacher",
        )

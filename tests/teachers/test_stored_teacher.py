"""A signal store as a teacher: its signals, missing rows, and what it cannot be used for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from stillhouse.data.batches import Batch, in_order
from stillhouse.data.data import Data
from stillhouse.errors import SignalError
from stillhouse.objectives import Term
from stillhouse.python_api import record
from stillhouse.signals import DenseSignal, SparseSignal
from stillhouse.signals.encodings import FrozenHead, Hidden, Sampled, TopK
from stillhouse.signals.manifest import Settings
from stillhouse.signals.store import open_store
from stillhouse.students.student import Student
from stillhouse.teachers import record_store
from stillhouse.teachers.activations import ActivationRequest
from stillhouse.teachers.local_teacher import LocalTeacher
from stillhouse.teachers.several_teachers import SeveralTeachers
from stillhouse.teachers.stored_head import head_sha256
from stillhouse.teachers.stored_teacher import StoredTeacher
from stillhouse.teachers.teacher import Teacher, TeacherNeeds
from tests import tiny

NEEDS = TeacherNeeds((Term("forward_kl"),))


class Counting(LocalTeacher):
    """Counts its calls."""

    calls = 0

    def answer(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return super().answer(*args, **kwargs)


@pytest.fixture(scope="module")
def data() -> Data:
    lines = tiny.text(120).splitlines()
    options: dict[str, Any] = {"packing": "none", "context": 32, "heldout_tokens": 128}
    return Data.build(lines, tiny.tokenizer(), **options)


@pytest.fixture
def teacher() -> Counting:
    return Counting(tiny.llama(), tiny.tokenizer())


def first(data: Data) -> Batch:
    return next(in_order(data.train, 128))


class EverySecond:
    """Every second training window."""

    def __init__(self, data: Data) -> None:
        self.text = data.train

    def __len__(self) -> int:
        return len(self.text) // 2

    def __getitem__(self, index: int) -> Batch:
        return self.text[2 * index]


def test_a_store_of_nearly_all_tokens_has_the_teachers_distribution(
    teacher: Counting, data: Data, tmp_path: Path
) -> None:
    stored = record(teacher, data, tmp_path, encoding=TopK(254))
    batch = first(data)
    (sparse,) = stored.answer(batch).signals
    (dense,) = teacher.answer(batch).signals
    assert isinstance(sparse, SparseSignal)
    assert isinstance(dense, DenseSignal)
    log_p_NV = torch.log_softmax(dense.hidden_ND @ dense.head.weight_VD.T, -1)
    expected_NK = log_p_NV.gather(1, sparse.ids_NK.long())
    torch.testing.assert_close(sparse.log_probs_NK, expected_NK, atol=5e-3, rtol=1e-3)


def test_only_missing_rows_are_scored_by_the_live_teacher(
    teacher: Counting, data: Data, tmp_path: Path
) -> None:
    record(teacher, data, tmp_path / "whole", encoding=TopK(8))
    record(teacher, EverySecond(data), tmp_path / "part", encoding=TopK(8))  # type: ignore[arg-type]
    whole, part = (Teacher.stored(tmp_path / name, missing=teacher) for name in ("whole", "part"))
    for stored in (whole, part):
        stored.prepare(NEEDS, data.train)
    teacher.calls = 0
    for batch in in_order(data.train, 128):
        (left,), (right,) = whole.answer(batch).signals, part.answer(batch).signals
        assert torch.equal(left.ids_NK, right.ids_NK)
        torch.testing.assert_close(left.log_probs_NK, right.log_probs_NK, atol=2e-3, rtol=0)
    assert teacher.calls == len(list(in_order(data.train, 128)))
    half = part.flops(1000) / teacher.flops(1000)
    assert 0.4 < half < 0.6
    assert whole.flops(1000) == 0


def test_missing_rows_are_an_error_before_training_and_in_a_batch(
    teacher: Counting, data: Data, tmp_path: Path
) -> None:
    record(teacher, EverySecond(data), tmp_path)  # type: ignore[arg-type]
    stored = Teacher.stored(tmp_path)
    with pytest.raises(SignalError, match=r"lacks [\d,]+ of [\d,]+ training tokens"):
        stored.prepare(NEEDS, data.train)
    with pytest.raises(SignalError, match="of this batch"):
        stored.answer(first(data))


def test_a_collective_teacher_answers_every_batch(
    teacher: Counting, data: Data, tmp_path: Path
) -> None:
    """Another process may lack rows that this one has in the store; both must call the teacher."""
    record(teacher, EverySecond(data), tmp_path)  # type: ignore[arg-type]
    teacher.collective = True
    stored = Teacher.stored(tmp_path, missing=teacher)
    stored.prepare(NEEDS, data.train)
    teacher.calls = 0
    known = EverySecond(data)[0]
    stored.answer({name: row[None] for name, row in known.items()})
    assert teacher.calls == 1


def test_stored_hidden_states_give_distributions_only_with_the_last_layer(
    teacher: Counting, data: Data, tmp_path: Path
) -> None:
    whole = record(teacher, data, tmp_path / "whole", encoding=Hidden((1, 3), 32))
    inner = record(teacher, data, tmp_path / "inner", encoding=Hidden((1,), 32))
    batch = first(data)
    live = teacher.answer(batch, ActivationRequest(frozenset({1, 3})))
    view = whole.answer(batch)
    torch.testing.assert_close(view.layers[1].float(), live.layers[1], rtol=1e-2, atol=1e-2)
    (signal,) = view.signals
    torch.testing.assert_close(
        signal.hidden_ND.float(), live.signals[0].hidden_ND, rtol=1e-2, atol=1e-2
    )
    assert inner.answer(batch).signals == ()
    assert whole.for_heldout([batch]) is whole
    assert inner.for_heldout([batch]) is None


def test_a_store_for_a_frozen_head_requires_that_head(
    teacher: Counting, data: Data, tmp_path: Path
) -> None:
    student = Student(tiny.llama(seed=1))
    student.trainable(freeze_head=True)
    head = student.frozen_head
    assert head is not None
    settings = Settings(FrozenHead(32), 260, {"head": head_sha256(head)})
    record_store.record(teacher, [data.train], settings, tmp_path, student_head=head)
    stored = StoredTeacher(open_store(tmp_path))
    stored.prepare(TeacherNeeds(NEEDS.terms, frozen_head=head), data.train)
    with pytest.raises(SignalError, match="head is not trained"):
        stored.prepare(NEEDS, data.train)
    other = LocalTeacher(tiny.llama(seed=2)).head
    with pytest.raises(SignalError, match="a different head"):
        stored.prepare(TeacherNeeds(NEEDS.terms, frozen_head=other), data.train)


@pytest.mark.parametrize(
    ("encoding", "needs", "message"),
    [
        (TopK(8), TeacherNeeds((Term("adaptive_kl"),)), "adaptive_kl cannot be computed"),
        (Sampled(8), TeacherNeeds((Term("jsd"),)), "jsd cannot be computed"),
        (TopK(8), TeacherNeeds((Term("forward_kl", temperature=2.0),)), "a different temperature"),
        (TopK(8), TeacherNeeds((), ActivationRequest(frozenset({1}))), "intermediate layers"),
        (Hidden((3,), 32), TeacherNeeds((), ActivationRequest(frozenset({1}))), r"needs \[1\]"),
    ],
)
def test_terms_that_a_store_cannot_serve_are_rejected(
    teacher: Counting, data: Data, tmp_path: Path, encoding: Any, needs: Any, message: str
) -> None:
    stored = record(teacher, data, tmp_path, encoding=encoding)
    with pytest.raises(SignalError, match=message) as caught:
        stored.prepare(needs, data.train)
    assert caught.value.fix


def test_a_store_of_another_tokenizer_is_rejected(
    teacher: Counting, data: Data, tmp_path: Path
) -> None:
    stored = record(teacher, data, tmp_path)
    words = tiny.tokenizer()
    words.add_tokens(["<more>"])
    with pytest.raises(SignalError, match="a different tokenizer"):
        stored.prepare(TeacherNeeds(NEEDS.terms, tokenizer=words), data.train)


def test_several_teachers_cannot_be_recorded_in_one_store(
    teacher: Counting, data: Data, tmp_path: Path
) -> None:
    with pytest.raises(SignalError, match="2 signals, and a store has only one"):
        record(SeveralTeachers([teacher, teacher]), data, tmp_path)


def test_repr_shows_the_content(teacher: Counting, data: Data, tmp_path: Path) -> None:
    stored = record(teacher, data, tmp_path)
    assert f"top_k signals in {tmp_path}" in repr(stored)
    assert f"{stored.store.manifest.rows:,} tokens of 260" in repr(stored)

"""Stores for a teacher with a different tokenizer: distributions over roots."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import stillhouse as sh
from stillhouse.data.batches import collate, positions_of
from stillhouse.data.shift import supervised_rows
from stillhouse.errors import SignalError, StoreError
from stillhouse.objectives import Term, fused_loss
from stillhouse.signals import DenseSignal, FoldedSignal, SampledSignal, SparseSignal
from stillhouse.signals.encodings import Encoding, FrozenHead, Sampled, Threshold, TopK, TopP
from stillhouse.signals.folded_store import FOLD
from stillhouse.signals.manifest import read_manifest
from stillhouse.signals.verify import verify
from stillhouse.students.student import Student
from stillhouse.teachers.aligned_teacher import AlignedTeacher
from stillhouse.teachers.backbone import hidden_states
from stillhouse.teachers.local_teacher import LocalTeacher
from stillhouse.teachers.teacher import TeacherView
from stillhouse.training.distillation import Distillation
from tests import tiny
from tests.teachers.tokenizer_toys import KINDS, byte_level

WORDS, OTHERS = byte_level(300), KINDS["sentencepiece"]()


def teacher() -> AlignedTeacher:
    model = tiny.llama(0, vocab_size=len(OTHERS))
    return AlignedTeacher(LocalTeacher(model, OTHERS), WORDS)


@pytest.fixture(scope="module")
def data() -> sh.Data:
    texts = [tiny.text(8, seed) for seed in range(12)]
    return sh.Data.build(texts, WORDS, context=32, train_tokens=600, heldout_tokens=64)


def read(live: AlignedTeacher, data: sh.Data, folder: Path, encoding: Encoding) -> Any:
    """The first windows, with their live and their stored signal."""
    stored = sh.record(live, data, folder, encoding=encoding)
    batch = collate([data.train[i] for i in range(4)])
    return batch, live.answer(batch).signals[0], stored.answer(batch).signals[0]


@torch.no_grad()
def roots_of(signal: FoldedSignal) -> torch.Tensor:
    """The live teacher's distribution over roots, [N, R]."""
    dense, fold = signal.signal, signal.fold
    assert isinstance(dense, DenseSignal)
    p_NW = (dense.hidden_ND @ dense.head.weight_VD.T).softmax(-1)[:, : len(fold.teacher_W)]
    return p_NW.new_zeros(len(p_NW), fold.roots).index_add(1, fold.teacher_W, p_NW)


def test_stored_top_roots_and_tails_match_the_live_teacher(data: sh.Data, tmp_path: Path) -> None:
    _, live, stored = read(teacher(), data, tmp_path / "store", TopK(16))
    assert isinstance(stored.signal, SparseSignal)
    assert torch.equal(stored.covered_N, live.covered_N)
    assert 0 < int(live.covered_N.sum()) < len(live.covered_N)
    p_NR = roots_of(live)[live.covered_N]
    covered = replace(
        stored.signal,
        ids_NK=stored.signal.ids_NK[live.covered_N],
        log_probs_NK=stored.signal.log_probs_NK[live.covered_N],
    )
    expected = p_NR.topk(16)
    torch.testing.assert_close(covered.log_probs_NK.exp(), expected.values, rtol=2e-3, atol=1e-5)
    torch.testing.assert_close(
        stored.signal.tail_N[live.covered_N], 1 - expected.values.sum(1), rtol=1e-2, atol=1e-4
    )


def test_rows_of_roots_take_as_many_bytes_as_rows_of_tokens(data: sh.Data, tmp_path: Path) -> None:
    same = LocalTeacher(tiny.llama(0, vocab_size=len(WORDS)), WORDS)
    sizes = []
    for name, each in (("same", same), ("other", teacher())):
        sh.record(each, data, tmp_path / name, encoding=TopK(16))
        sizes.append(read_manifest(tmp_path / name).quality.bytes)
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize("encoding", [TopK(40), TopP(1.0, 40)])
def test_the_loss_matches_one_over_the_live_teachers_top_roots(
    data: sh.Data, tmp_path: Path, encoding: Encoding
) -> None:
    batch, live, stored = read(teacher(), data, tmp_path / "store", encoding)
    student = tiny.llama(1, vocab_size=len(WORDS))
    module = Distillation(student, teacher=sh.Teacher.stored(tmp_path / "store"))
    found = module(batch, TeacherView((stored,))).total
    rows = live.covered_N
    with torch.no_grad():
        hidden_RLD = hidden_states(student, batch["input_ids"], batch["position_ids"])
        q_NV = (
            supervised_rows(hidden_RLD, positions_of(batch)) @ student.lm_head.weight.T
        ).softmax(-1)
        p_NR = roots_of(live)[rows]
        q_NR = torch.zeros_like(p_NR).index_add(1, live.fold.student_V, q_NV[rows])
        top = p_NR.topk(40)
        p_NB, q_NB = (
            torch.cat([kept, 1 - kept.sum(1, keepdim=True)], 1)
            for kept in (top.values, q_NR.gather(1, top.indices))
        )
        expected = (p_NB * (p_NB / q_NB).log()).sum()
    assert float(found.detach()) == pytest.approx(float(expected), rel=0.01)


@pytest.mark.parametrize("encoding", [Threshold(tau=0.02), Sampled(50)])
def test_samples_of_roots_estimate_the_live_cross_entropy(
    data: sh.Data, tmp_path: Path, encoding: Encoding
) -> None:
    _, live, stored = read(teacher(), data, tmp_path / "store", encoding)
    assert isinstance(stored.signal, SampledSignal)
    assert torch.equal(stored.covered_N, live.covered_N)
    p_NR = roots_of(live)
    shares = stored.signal.counts_NK / stored.signal.counts_NK.sum(1, keepdim=True)
    found_NR = torch.zeros_like(p_NR).scatter_add(1, stored.signal.ids_NK, shares)
    rows = live.covered_N
    torch.testing.assert_close(found_NR[rows].mean(0), p_NR[rows].mean(0), rtol=0, atol=0.02)
    g = torch.Generator().manual_seed(0)
    hidden_ND = torch.randn(len(rows), 8, generator=g).requires_grad_()
    head = sh.LMHead(torch.randn(len(WORDS), 8, generator=g).requires_grad_())
    loss = fused_loss(hidden_ND, head, [Term("forward_kl")], signal=stored)
    log_q_NV = (hidden_ND @ head.weight_VD.T).log_softmax(-1)
    q_NR = torch.zeros_like(p_NR).index_add(1, live.fold.student_V, log_q_NV.exp())
    expected = -(found_NR[rows] * q_NR[rows].log()).sum()
    torch.testing.assert_close(loss.total, expected, rtol=1e-4, atol=0)
    for ours, theirs in zip(
        torch.autograd.grad(loss.total, [hidden_ND, head.weight_VD]),
        torch.autograd.grad(expected, [hidden_ND, head.weight_VD]),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_a_student_trains_on_the_store_and_one_with_other_tokens_is_rejected(
    data: sh.Data, tmp_path: Path
) -> None:
    stored = sh.record(teacher(), data, tmp_path / "store", encoding=TopK(16))
    model = tiny.llama(1, vocab_size=len(WORDS))
    sh.distill(Student(model, WORDS), stored, data, max_steps=2, batch_size=4)
    other = byte_level(300, seed=7)
    wrong = Student(tiny.llama(1, vocab_size=len(other)), other)
    with pytest.raises(SignalError, match="recorded with a different tokenizer"):
        sh.distill(wrong, stored, data, max_steps=2, batch_size=4)


def test_the_identity_contains_both_tokenizers_and_the_roots(data: sh.Data, tmp_path: Path) -> None:
    live = teacher()
    sh.record(live, data, tmp_path / "store", encoding=TopK(16))
    identity = read_manifest(tmp_path / "store").settings.identity
    assert {"teacher", "tokenizer", "teacher_tokenizer", "roots"} <= identity.keys()
    again = AlignedTeacher(
        live.teacher, WORDS, replace(live.roots, student_V=live.roots.student_V[::-1].copy())
    )
    with pytest.raises(SignalError, match="a different roots"):
        sh.record(again, data, tmp_path / "store", encoding=TopK(16))


@pytest.mark.parametrize("damage", ["missing", "other"])
def test_a_missing_or_damaged_file_of_roots_is_one_message(
    data: sh.Data, tmp_path: Path, damage: str
) -> None:
    sh.record(teacher(), data, tmp_path / "store", encoding=TopK(16))
    assert verify(tmp_path / "store") == []
    file = tmp_path / "store" / FOLD
    file.unlink() if damage == "missing" else file.write_bytes(file.read_bytes()[:-4] + b"\1\0\0\0")
    with pytest.raises(StoreError, match="roots of the student's tokens"):
        sh.Teacher.stored(tmp_path / "store")
    assert len(verify(tmp_path / "store")) == 1


def test_an_encoding_that_needs_the_students_head_is_rejected(
    data: sh.Data, tmp_path: Path
) -> None:
    with pytest.raises(SignalError, match="student's head"):
        sh.record(teacher(), data, tmp_path / "store", encoding=FrozenHead(32))

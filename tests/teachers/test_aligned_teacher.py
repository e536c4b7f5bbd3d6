"""A teacher with a different tokenizer gives signals for the student's tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import stillhouse as sh
from stillhouse.data.batches import Batch, collate, positions_of, targets_of
from stillhouse.data.shift import supervised_rows, supervised_targets
from stillhouse.errors import SignalError
from stillhouse.objectives import Term, fused_loss
from stillhouse.objectives.objective_config import (
    AttentionRelationsTerm,
    ChunksTerm,
    LogitsTerm,
    ObjectiveTerm,
)
from stillhouse.signals import ChunkSignal, FoldedSignal
from stillhouse.signals.lm_head import target_log_probabilities
from stillhouse.students.student import Student
from stillhouse.teachers.aligned_teacher import AlignedTeacher
from stillhouse.teachers.backbone import hidden_states, lm_head
from stillhouse.teachers.local_teacher import LocalTeacher
from stillhouse.teachers.teacher import OUTPUT_ONLY, TeacherNeeds, TeacherView
from stillhouse.training.distillation import Distillation
from tests import tiny
from tests.teachers.tokenizer_toys import KINDS, byte_level


def model_for(tokenizer: Any, seed: int = 0) -> Any:
    return tiny.llama(seed, vocab_size=len(tokenizer)).double()


def batch_of(tokenizer: Any, rows: int = 3, length: int = 24) -> Batch:
    """Windows with two documents each; all tokens but their first are supervised."""
    windows = []
    for row in range(rows):
        ids: list[int] = []
        for part in range(2):
            words = tokenizer(tiny.text(9, 2 * row + part), add_special_tokens=False)["input_ids"]
            ids += [*words[: length // 2 - 1], tokenizer.eos_token_id]
        positions_L = torch.arange(length) % (length // 2)
        ids_L = torch.tensor(ids)
        windows.append(
            {
                "input_ids": ids_L,
                "labels": ids_L.where(positions_L > 0, -100),
                "position_ids": positions_L,
            }
        )
    return collate(windows)


def loss_under(teacher: Any, batch: Batch, student: Any) -> tuple[Tensor, list[Tensor]]:
    found = Distillation(student, teacher=teacher)(batch, teacher.answer(batch))
    return found.total, list(torch.autograd.grad(found.total, list(student.parameters())))


def test_with_equal_tokenizers_the_loss_is_forward_kl() -> None:
    words = byte_level(300)
    teacher, student = model_for(words), model_for(words, seed=1)
    batch = batch_of(words)
    local = LocalTeacher(teacher, words)
    aligned = AlignedTeacher(LocalTeacher(teacher, words), byte_level(300))
    (expected, gradients), (found, ours) = (
        loss_under(each, batch, student) for each in (local, aligned)
    )
    assert expected.item() > 1
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=0)
    for one, other in zip(ours, gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_matches_a_slow_reference(kind: str) -> None:
    """At each shared boundary, the reference runs the teacher on its tokens of the bytes before."""
    words, others = byte_level(300), KINDS[kind]()
    teacher = LocalTeacher(model_for(others), others)
    aligned = AlignedTeacher(teacher, words)
    student = model_for(words, seed=1)
    batch = batch_of(words)
    aligned.prepare(Distillation(student, teacher=aligned).objective.needs)
    (signal,) = aligned.answer(batch).signals
    assert isinstance(signal, FoldedSignal)
    assert signal.covered_N.float().mean() > 0.6
    rewritten = aligned.rewritten(batch).batch
    expected = torch.zeros((), dtype=torch.float64)
    hidden_RLD = hidden_states(student, batch["input_ids"], batch["position_ids"])
    rows = iter(signal.covered_N.tolist())
    places = iter(
        [
            (r, int(t))
            for r, labels in enumerate(rewritten["labels"])
            for t in (labels >= 0).nonzero()
        ]
    )
    for r, labels_L in enumerate(batch["labels"]):
        for t in (labels_L >= 0).nonzero()[:, 0].tolist():
            if not next(rows):
                continue
            row, at = next(places)
            assert row == r
            start = int((rewritten["position_ids"][r, :at] == 0).nonzero()[-1])
            read = rewritten["input_ids"][r, start:at]
            log_p_W = teacher.model(read[None]).logits[0, -1].log_softmax(-1)
            log_q_V = (hidden_RLD[r, t - 1] @ lm_head(student).weight_VD.T).log_softmax(-1)
            roots = aligned.roots
            log_p_R, log_q_R = (
                torch.zeros(roots.count, dtype=torch.float64)
                .index_add(0, torch.from_numpy(roots_X), log_p[: len(roots_X)].exp())
                .clamp_min(1e-300)
                .log()
                for roots_X, log_p in ((roots.teacher_W, log_p_W), (roots.student_V, log_q_V))
            )
            expected = expected + (log_p_R.exp() * (log_p_R - log_q_R)).sum()
    assert next(rows, None) is None
    rows_ND = supervised_rows(hidden_RLD, positions_of(batch))
    found = fused_loss(rows_ND, lm_head(student), [Term("forward_kl")], signal=signal).total
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)


def test_exact_models_of_one_source_have_no_loss_at_word_starts() -> None:
    """Words are drawn at random, so that the probabilities of a word's first token follow from the
    words' shares with each tokenizer, and the folded distributions are equal."""
    ours, theirs = byte_level(300), byte_level(330, seed=1)
    said = {" the": 0.4, " cat": 0.2, " carries": 0.15, " trees": 0.15, " twelve": 0.1}
    aligned = AlignedTeacher(LocalTeacher(model_for(theirs), theirs), ours)
    logits = []
    for tokens in (aligned.aligner.student, aligned.aligner.teacher):
        share_X = torch.full((tokens.size,), 1e-300, dtype=torch.float64)
        for word, share in said.items():
            share_X[tokens.encode([word])[0][0]] += share
        logits.append(share_X.log())
    heads = [sh.LMHead(logits_X[:, None].requires_grad_()) for logits_X in logits]
    one_ND = torch.ones(1, 1, dtype=torch.float64)
    losses = []
    for change in (0.0, 0.5):
        moved = heads[0].weight_VD.detach().clone()
        moved[ours(" the")["input_ids"][0]] += change
        signal = FoldedSignal(
            sh.DenseSignal(one_ND, heads[1]), aligned.roots.fold, torch.tensor([True])
        )
        head = sh.LMHead(moved.requires_grad_())
        losses.append(fused_loss(one_ND, head, [Term("forward_kl")], signal=signal).total.item())
    assert losses[0] == pytest.approx(0, abs=1e-9)
    assert losses[1] > 0.01


def test_the_end_of_a_text_is_covered() -> None:
    words, others = byte_level(300), KINDS["sentencepiece"]()
    aligned = AlignedTeacher(LocalTeacher(model_for(others), others), words)
    batch = batch_of(words)
    (signal,) = aligned.answer(batch).signals
    ends_N = supervised_targets(batch["labels"]) == words.eos_token_id
    assert signal.covered_N[ends_N].all()
    fold = signal.fold
    assert fold.student_V[words.eos_token_id] == fold.teacher_W[others.eos_token_id]


@pytest.mark.run
def test_an_aligned_teacher_trains_a_student_through_the_python_api() -> None:
    words, others = byte_level(300), KINDS["byte-level"]()
    teacher = LocalTeacher(model_for(others).float(), others).aligned(words)
    assert isinstance(teacher, AlignedTeacher)
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        eos_token_id=words.eos_token_id,
        bos_token_id=None,
    )
    torch.manual_seed(0)
    student = Student(LlamaForCausalLM(config), words)
    texts = [line for seed in range(4) for line in tiny.text(60, seed).splitlines()]
    data = sh.Data.build(texts, words, context=32, heldout_tokens=200)
    result = sh.distill(
        student, teacher, data, learning_rate=1e-2, epochs=2, batch_size=4, precision="float32"
    )
    losses = [row["loss"] for row in result.metrics if "loss" in row]
    assert losses[-1] < losses[0] - 0.1
    assert teacher.roots.merges or teacher.roots.count > 256


def test_a_teacher_with_the_same_tokenizer_is_not_wrapped() -> None:
    words = byte_level(300)
    teacher = LocalTeacher(model_for(words), words)
    assert teacher.aligned(byte_level(300)) is teacher


def test_terms_on_intermediate_layers_are_rejected() -> None:
    words, others = byte_level(300), KINDS["byte-level"]()
    aligned = AlignedTeacher(LocalTeacher(model_for(others), others), words)
    terms = [AttentionRelationsTerm(kind="attention_relations", heads=2)]
    needs = Distillation(model_for(words), terms, aligned).objective.needs
    with pytest.raises(SignalError, match="a different tokenizer than the student"):
        aligned.prepare(needs)


@pytest.mark.parametrize("kind", KINDS)
def test_likelihoods_of_chunks_match_a_slow_reference(kind: str) -> None:
    """For each token of a chunk, the reference gives the teacher all preceding tokens."""
    words, others = byte_level(300), KINDS[kind]()
    teacher = LocalTeacher(model_for(others), others)
    aligned = AlignedTeacher(teacher, words)
    aligned.prepare(TeacherNeeds(chunks=True))
    batch = batch_of(words)
    (signal,) = aligned.answer(batch).signals
    assert isinstance(signal, FoldedSignal)
    assert signal.chunks is not None
    rewritten = aligned.rewritten(batch)
    expected, rows = [], []
    done = 0
    for r, window in enumerate(rewritten.windows):
        labels_L = batch["labels"][r].numpy()
        chunks = aligned.aligner.chunks(
            window, batch["input_ids"][r].numpy(), batch["position_ids"][r].numpy(), labels_L >= 0
        )
        number_L = (labels_L >= 0).cumsum() - 1 + done
        for (start, stop), (begin, end) in zip(
            chunks.student_C2.tolist(), chunks.teacher_C2.tolist(), strict=True
        ):
            if max(stop - start, end - begin) == 1:
                continue
            rows += number_L[start:stop].tolist()
            log_p = 0.0
            for at in range(begin, end):
                first = int((window.positions_M[:at] == 0).nonzero()[0][-1])
                read = torch.from_numpy(window.ids_M[first:at])
                log_p_W = teacher.model(read[None]).logits[0, -1].log_softmax(-1)
                log_p += float(log_p_W[window.ids_M[at]].detach())
            expected.append(log_p)
        done += int((labels_L >= 0).sum())
    assert expected
    assert signal.chunks.rows_P.tolist() == rows
    torch.testing.assert_close(
        signal.chunks.log_probs_C.double(), torch.tensor(expected).double(), rtol=1e-5, atol=1e-5
    )


def test_the_fold_is_the_same_with_and_without_chunks() -> None:
    words, others = byte_level(300), KINDS["bytes"]()
    aligned = AlignedTeacher(LocalTeacher(model_for(others), others), words)
    batch, student = batch_of(words), model_for(words, seed=1)
    (without,) = aligned.answer(batch).signals
    aligned.prepare(TeacherNeeds(chunks=True))
    (with_chunks,) = aligned.answer(batch).signals
    assert isinstance(without, FoldedSignal)
    assert isinstance(with_chunks, FoldedSignal)
    assert torch.equal(with_chunks.covered_N, without.covered_N)
    torch.testing.assert_close(with_chunks.signal.hidden_ND, without.signal.hidden_ND)
    terms: list[ObjectiveTerm] = [LogitsTerm(), ChunksTerm(kind="chunks", weight=0.5)]
    loss = Distillation(student, terms, aligned)(batch, aligned.answer(batch))
    assert set(loss.terms) == {"forward_kl", "chunks binary"}
    alone = Distillation(student, teacher=aligned)(batch, aligned.answer(batch))
    expected = alone.total + 0.5 * loss.terms["chunks binary"]
    torch.testing.assert_close(loss.total, expected.to(loss.total.dtype))


def test_with_equal_tokenizers_no_chunk_has_several_tokens() -> None:
    words = byte_level(300)
    aligned = AlignedTeacher(LocalTeacher(model_for(words), words), byte_level(300))
    aligned.prepare(TeacherNeeds(chunks=True))
    (signal,) = aligned.answer(batch_of(words)).signals
    assert isinstance(signal, FoldedSignal)
    assert signal.chunks is not None
    assert len(signal.chunks.log_probs_C) == 0


class OnlyTokens(LocalTeacher):
    """A teacher that returns only the log-probabilities of the text's tokens."""

    full_distributions = False

    def answer(self, batch: Batch, request: Any = OUTPUT_ONLY) -> TeacherView:
        (dense,) = super().answer(batch).signals
        targets_N = targets_of(batch)
        return TeacherView(
            log_probs_N=target_log_probabilities(dense.head, dense.hidden_ND, targets_N)
        )


def test_chunk_likelihoods_follow_from_one_log_probability_per_token() -> None:
    words, others = byte_level(300), KINDS["sentencepiece"]()
    model, batch = model_for(others), batch_of(words)
    full, sparse = (
        AlignedTeacher(kind(model, others), words) for kind in (LocalTeacher, OnlyTokens)
    )
    for each in (full, sparse):
        each.prepare(TeacherNeeds(chunks=True))
    (folded,), (chunks,) = (each.answer(batch).signals for each in (full, sparse))
    assert isinstance(folded, FoldedSignal)
    assert isinstance(chunks, ChunkSignal)
    several = torch.bincount(chunks.chunk_P) > 1
    assert folded.chunks is not None
    gaps_CC = chunks.log_probs_C[several][:, None] - folded.chunks.log_probs_C[None]
    assert float(gaps_CC.abs().amin(1).max()) < 1e-4
    assert len(chunks.log_probs_C) > len(folded.chunks.log_probs_C)
    student = model_for(words, seed=1)
    terms: list[ObjectiveTerm] = [
        ChunksTerm(kind="chunks"),
        LogitsTerm(divergence="cross_entropy", weight=0.1),
    ]
    module = Distillation(student, terms, sparse)
    loss = module(batch, sparse.answer(batch))
    loss.total.backward()
    assert float(loss.terms["chunks binary"]) > 0
    with pytest.raises(SignalError, match="returns no complete distributions"):
        sparse.prepare(Distillation(student, teacher=sparse).objective.needs)


def test_a_term_on_chunks_requires_a_different_tokenizer() -> None:
    words = byte_level(300)
    local = LocalTeacher(model_for(words).float(), words)
    texts = [tiny.text(8, seed) for seed in range(12)]
    data = sh.Data.build(texts, words, context=32, heldout_tokens=64)
    student = Student(model_for(words, seed=1).float(), words)
    with pytest.raises(SignalError, match="has the student's tokenizer"):
        sh.distill(student, local, data, objective=[sh.KL(), ChunksTerm(kind="chunks")])

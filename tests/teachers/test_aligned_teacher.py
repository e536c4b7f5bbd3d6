"""A teacher with another tokenizer teaches a student in the student's tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import stillhouse as sh
from stillhouse.data.batches import Batch, collate, positions_of
from stillhouse.data.shift import supervised_rows, supervised_targets
from stillhouse.errors import SignalError
from stillhouse.objectives import Term, fused_loss
from stillhouse.objectives.objective_config import AttentionRelationsTerm
from stillhouse.signals import FoldedSignal
from stillhouse.students.student import Student
from stillhouse.teachers.aligned_teacher import AlignedTeacher
from stillhouse.teachers.backbone import hidden_states, lm_head
from stillhouse.teachers.local_teacher import LocalTeacher
from stillhouse.training.distillation import Distillation
from tests import tiny
from tests.teachers.tokenizer_toys import KINDS, byte_level


def model_for(tokenizer: Any, seed: int = 0) -> Any:
    return tiny.llama(seed, vocab_size=len(tokenizer)).double()


def batch_of(tokenizer: Any, rows: int = 3, length: int = 24) -> Batch:
    """Windows with two documents each; all but their first tokens are predicted."""
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


def test_with_the_students_tokenizer_it_is_the_usual_forward_kl() -> None:
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
def test_the_loss_is_that_of_a_slow_reference(kind: str) -> None:
    """One shared boundary at a time: the teacher reads the bytes before it, in its own tokens."""
    words, others = byte_level(300), KINDS[kind]()
    aligned = AlignedTeacher(LocalTeacher(model_for(others), others), words)
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
    places = [
        (r, t) for r, labels in enumerate(rewritten["labels"]) for t in (labels >= 0).nonzero()
    ]
    places = iter([(r, int(t)) for r, t in places])
    for r, labels_L in enumerate(batch["labels"]):
        for t in (labels_L >= 0).nonzero()[:, 0].tolist():
            if not next(rows):
                continue
            row, at = next(places)
            assert row == r
            start = int((rewritten["position_ids"][r, :at] == 0).nonzero()[-1])
            read = rewritten["input_ids"][r, start:at]
            log_p_W = aligned.teacher.model(read[None]).logits[0, -1].log_softmax(-1)
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
    """Words drawn at random: at the start of a word, the probability of each tokenizer's first
    token follows from the words' shares, and the folded distributions are equal."""
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


def test_the_end_of_a_text_is_learned() -> None:
    words, others = byte_level(300), KINDS["sentencepiece"]()
    aligned = AlignedTeacher(LocalTeacher(model_for(others), others), words)
    batch = batch_of(words)
    (signal,) = aligned.answer(batch).signals
    ends_N = supervised_targets(batch["labels"]) == words.eos_token_id
    assert signal.covered_N[ends_N].all()
    fold = signal.fold
    assert fold.student_V[words.eos_token_id] == fold.teacher_W[others.eos_token_id]


def test_it_trains_a_student_through_the_python_api() -> None:
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


def test_a_teacher_of_the_same_tokenizer_stays_as_it_is() -> None:
    words = byte_level(300)
    teacher = LocalTeacher(model_for(words), words)
    assert teacher.aligned(byte_level(300)) is teacher


def test_terms_on_intermediate_layers_are_refused() -> None:
    words, others = byte_level(300), KINDS["byte-level"]()
    aligned = AlignedTeacher(LocalTeacher(model_for(others), others), words)
    terms = [AttentionRelationsTerm(kind="attention_relations", heads=2)]
    needs = Distillation(model_for(words), terms, aligned).objective.needs
    with pytest.raises(SignalError, match="other tokens than the student"):
        aligned.prepare(needs)

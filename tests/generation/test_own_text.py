"""A model's own answers, and their scores, compared with scoring one token at a time in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from stillhouse.generation import own_text as module
from stillhouse.generation.local_generator import LocalGenerator
from stillhouse.generation.own_text import (
    OwnAnswer,
    TokenScores,
    answer_states,
    own_text,
    own_text_sums,
    repeated_ngrams,
    score_tokens,
    write_answers,
)
from stillhouse.generation.own_text_figures import OwnText
from stillhouse.signals import lm_head as lm_head_module
from tests import tiny

ENDS = frozenset(range(24))
"""Tokens that end an answer, enough that random models occasionally write one."""
PROMPTS = [[5, 9, 30], [77], [40, 41, 42, 43, 44, 45, 46], [100, 3]]
VOCABULARY = len(tiny.tokenizer())


def answers_of(model: Any, **changes: Any) -> list[OwnAnswer]:
    options = {"max_tokens": 12, "temperature": 1.0, **changes}
    return write_answers(LocalGenerator(model, ENDS, batch=3), PROMPTS, **options)


def scored(model: Any, teacher: Any, answers: list[OwnAnswer], vocabulary: int) -> TokenScores:
    states = answer_states(model, answers), answer_states(teacher, answers)
    return score_tokens(answers, *states, vocabulary)


def log_softmax(logits: list[float]) -> list[float]:
    top = max(logits)
    total = top + math.log(sum(math.exp(value - top) for value in logits))
    return [value - total for value in logits]


def reference(model: Any, teacher: Any, answers: list[OwnAnswer], vocabulary: int) -> list[Any]:
    """For each token: both KLs, the entropy, and the teacher's log-probability, computed in a
    separate pass for each prefix."""
    model, teacher = model.double(), teacher.double()
    rows = []
    for answer in answers:
        for at, token in enumerate(answer.ids):
            prefix = torch.tensor([[*answer.prompt, *answer.ids[:at]]])
            with torch.no_grad():
                log_p = log_softmax(teacher(prefix).logits[0, -1, :vocabulary].tolist())
                log_q = log_softmax(model(prefix).logits[0, -1, :vocabulary].tolist())
            pairs = list(zip(log_p, log_q, strict=True))
            forward = sum(math.exp(p) * (p - q) for p, q in pairs)
            reverse = sum(math.exp(q) * (q - p) for p, q in pairs)
            rows.append((forward, reverse, -sum(math.exp(q) * q for q in log_q), log_p[token]))
    model.float(), teacher.float()
    return rows


@pytest.mark.parametrize("at_once", [1, 3, 8])
@pytest.mark.parametrize("cut", [0, 20])
def test_scores_match_the_slow_reference(
    monkeypatch: pytest.MonkeyPatch, at_once: int, cut: int
) -> None:
    """For any number of answers and rows at a time, and for an LM head with padding rows."""
    monkeypatch.setattr(module, "ANSWERS_PER_FORWARD", at_once)
    monkeypatch.setattr(lm_head_module, "CHUNK_LOGITS", at_once * VOCABULARY)
    model, teacher = tiny.llama(1), tiny.llama(2)
    answers = answers_of(model)
    vocabulary = VOCABULARY - cut
    answers = [one for one in answers if max(one.ids) < vocabulary]
    assert len(answers) >= 2
    found = scored(model, teacher, answers, vocabulary)
    columns = (found.forward_kl_N, found.reverse_kl_N, found.entropy_N, found.teacher_logprob_N)
    expected = torch.tensor(reference(model, teacher, answers, vocabulary))
    torch.testing.assert_close(torch.stack(columns, -1), expected.float(), rtol=1e-4, atol=1e-5)


def test_a_student_that_equals_its_teacher_has_no_kl() -> None:
    answers = answers_of(tiny.llama(1))
    found = scored(tiny.llama(1), tiny.llama(1), answers, VOCABULARY)
    assert found.forward_kl_N.abs().max() == found.reverse_kl_N.abs().max() == 0


def test_scores_do_not_depend_on_the_other_answers_in_a_batch() -> None:
    """Each answer scored alone has the scores that it has in a padded batch."""
    model, teacher = tiny.llama(1), tiny.llama(2)
    answers = answers_of(model)
    together = scored(model, teacher, answers, VOCABULARY).reverse_kl_N
    alone = [scored(model, teacher, [one], VOCABULARY).reverse_kl_N for one in answers]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-6)


def test_the_means_are_over_all_tokens_and_answers() -> None:
    answers = [OwnAnswer([1], [5, 6, 5, 6, 5, 6, 0], True), OwnAnswer([2], [7, 8], False)]
    columns = [torch.arange(9.0) + shift for shift in (0.0, 1.0, 2.0, -10.0)]
    found = own_text(own_text_sums(answers, TokenScores(*columns)))
    assert found == OwnText(
        forward_kl=4.0,
        reverse_kl=5.0,
        entropy=6.0,
        teacher_logprob=-6.0,
        length=4.5,
        cut_off=0.5,
        repetition=1 / 4,
        answers=2,
        tokens=9,
    )


def test_sums_over_parts_add_up_to_the_sums_over_all_answers() -> None:
    model, teacher = tiny.llama(1), tiny.llama(2)
    answers = answers_of(model)
    halves = [answers[::2], answers[1::2]]
    parts = [own_text_sums(some, scored(model, teacher, some, VOCABULARY)) for some in halves]
    whole = own_text_sums(answers, scored(model, teacher, answers, VOCABULARY))
    torch.testing.assert_close(sum(parts), whole, rtol=1e-5, atol=1e-5)


def test_without_answers_there_is_no_measurement() -> None:
    model = tiny.llama(1)
    assert own_text(own_text_sums([], scored(model, model, [], VOCABULARY))) is None


def test_repetition_counts_ngrams_that_occurred_earlier_in_the_answer() -> None:
    assert repeated_ngrams([1, 2, 3]) == (0, 0)
    assert repeated_ngrams([1, 2, 3, 4, 5]) == (0, 2)
    assert repeated_ngrams([1] * 10) == (6, 7)
    assert repeated_ngrams([1, 2, 3, 4, 9, 1, 2, 3, 4]) == (1, 6)


def test_answers_are_in_the_order_of_their_prompts() -> None:
    model = tiny.llama(1)
    answers = answers_of(model, temperature=0.0)
    assert [list(one.prompt) for one in answers] == PROMPTS
    for one in answers:
        assert one.ended == (one.ids[-1] in ENDS)
        assert one.ended or len(one.ids) == 12


def test_prompts_that_fill_the_context_are_skipped() -> None:
    model = tiny.llama(1, max_position_embeddings=16)
    generator = LocalGenerator(model, frozenset())
    prompts = [[50] * 16, [51] * 12, [52] * 3, []]
    answers = write_answers(generator, prompts, max_tokens=8)
    assert [(len(one.prompt), len(one.ids)) for one in answers] == [(12, 4), (3, 8)]


def test_the_number_of_forward_passes_can_be_fixed_for_sharded_models() -> None:
    model, calls = tiny.llama(1), []
    model.model.register_forward_hook(lambda *_: calls.append(1))
    answers = answers_of(tiny.llama(1))
    expected = answer_states(tiny.llama(1), answers).hidden_ND
    states = answer_states(model, answers, passes=3)
    assert len(calls) == 3
    torch.testing.assert_close(states.hidden_ND, expected, rtol=0, atol=0)

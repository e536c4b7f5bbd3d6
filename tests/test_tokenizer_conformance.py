"""Checks of losses under a teacher with a different tokenizer, tried on losses that fail them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from bench.tokenizer_conformance import CHECKS, conform
from bench.tokenizer_contenders import Contender, contenders, forward_kl, stillhouse
from bench.tokenizer_problems import TokenizerProblem
from torch import Tensor

LOSSES = contenders(None)


def test_our_loss_passes_every_check() -> None:
    assert conform(LOSSES["stillhouse"]) == dict.fromkeys(CHECKS, "")


def test_uld_is_blind_to_which_token_is_which() -> None:
    found = conform(LOSSES["uld, as published"])
    assert "blind" in found["permuted probabilities"]
    assert found["rows that predict"] == found["the end of a text"] == found["equal models"] == ""


def test_gold_is_a_divergence_between_equal_tokenizers_and_biased_between_others() -> None:
    found = conform(LOSSES["gold, as published"])
    assert found["equal tokenizers"] == found["rows that predict"] == ""
    assert "biased" in found["exact models of one source"]


def one_off(problem: TokenizerProblem) -> tuple[Tensor, Tensor]:
    """Reads the row of each token instead of the one that predicts it."""
    sides = [
        replace(each, logits_LV=each.logits_LV.roll(-1, dims=0))
        for each in (problem.student, problem.teacher)
    ]
    value, gradient_LV = stillhouse(replace(problem, student=sides[0], teacher=sides[1]))
    return value, gradient_LV.roll(1, dims=0)


def without_end(problem: TokenizerProblem) -> tuple[Tensor, Tensor]:
    value, gradient_LV = stillhouse(problem)
    return value, gradient_LV.index_fill(0, torch.tensor([len(gradient_LV) - 2]), 0.0)


@pytest.mark.parametrize(
    ("faulty", "check"), [(one_off, "rows that predict"), (without_end, "the end of a text")]
)
def test_a_faulty_loss_fails_the_check(
    faulty: Callable[[TokenizerProblem], tuple[Tensor, Tensor]], check: str
) -> None:
    assert conform(Contender(faulty, forward_kl))[check]

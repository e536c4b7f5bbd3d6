"""Sampling for a batch chooses the same tokens as sampling for each row alone."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from torch import Tensor

from stillhouse.generation.sampling import most_probable, next_tokens


def drawn(logits_V: Tensor, temperature: float, top_p: float, uniform: float) -> int:
    """The straightforward way: sort, remove what is outside the nucleus, and accumulate."""
    probabilities_V = torch.softmax(logits_V.double() / temperature, -1)
    if top_p < 1:
        order_V = probabilities_V.argsort(descending=True)
        before_V = probabilities_V[order_V].cumsum(-1) - probabilities_V[order_V]
        probabilities_V[order_V[before_V >= top_p]] = 0.0
        kept_V = probabilities_V[order_V]
        return int(order_V[int((kept_V.cumsum(-1) <= uniform * kept_V.sum()).sum())])
    sums_V = probabilities_V.cumsum(-1)
    return int((sums_V <= uniform * sums_V[-1]).sum())


@pytest.mark.parametrize("vocabulary", [3, 256, 1000, 3001])
def test_a_batch_gets_the_same_tokens_as_its_rows_alone(vocabulary: int) -> None:
    """Settings differ between rows, and some nuclei have more than 64 or 512 tokens."""
    torch.manual_seed(vocabulary)
    chance = random.Random(vocabulary)
    settings = [*itertools.product([0.0, 0.5, 1.0, 3.0], [1.0, 0.999, 0.9, 0.3, 1e-9])]
    chance.shuffle(settings)
    logits_BV = torch.randn(len(settings), vocabulary) * 2
    temperatures, top_ps = zip(*settings, strict=True)
    uniforms = [chance.random() for _ in settings]
    tokens = next_tokens(logits_BV, temperatures, top_ps, uniforms)
    for row, token in enumerate(tokens):
        one = (temperatures[row], top_ps[row], uniforms[row])
        expected = drawn(logits_BV[row], *one) if one[0] else int(logits_BV[row].argmax())
        assert token == expected, one
        assert next_tokens(logits_BV[row, None], *([value] for value in one)) == [token]


@pytest.mark.parametrize("top_p", [1.0, 0.7])
def test_draws_follow_the_distribution(top_p: float) -> None:
    """Evenly spaced uniforms hit each token in proportion to its share of the nucleus."""
    torch.manual_seed(0)
    logits_V = torch.randn(1000) * 2
    probabilities_V = torch.softmax(logits_V, -1)
    order_V = probabilities_V.argsort(descending=True)
    before_V = probabilities_V[order_V].cumsum(-1) - probabilities_V[order_V]
    expected_V = probabilities_V.clone()
    expected_V[order_V[before_V >= top_p]] = 0.0
    expected_V /= expected_V.sum()
    draws = 4000
    uniforms = [(n + 0.5) / draws for n in range(draws)]
    tokens = next_tokens(logits_V.expand(draws, -1), [1.0] * draws, [top_p] * draws, uniforms)
    shares_V = torch.bincount(torch.tensor(tokens), minlength=1000) / draws
    torch.testing.assert_close(shares_V, expected_V, atol=1.01 / draws, rtol=0)


@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_impossible_tokens_are_not_drawn(top_p: float) -> None:
    logits_BV = torch.full((3, 700), -torch.inf)
    logits_BV[:, [300, 301, 600]] = 0.0
    ends = [0.0, 0.5, 1 - 2**-53]
    assert next_tokens(logits_BV, [1.0] * 3, [1.0] * 3, ends) == [300, 301, 600]
    assert set(next_tokens(logits_BV, [1.0] * 3, [top_p] * 3, ends)) <= {300, 301, 600}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocabulary", [1, 255, 256, 1025])
def test_among_equally_probable_tokens_the_first_is_chosen(
    vocabulary: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    logits_BV = torch.randn(50, vocabulary).round(decimals=0).to(dtype)
    assert torch.equal(most_probable(logits_BV), logits_BV.argmax(-1))
    lowest_BV = torch.full((1, vocabulary), -torch.inf, dtype=dtype)
    assert most_probable(lowest_BV).tolist() == [0]

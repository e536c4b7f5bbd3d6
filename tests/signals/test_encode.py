"""Each encoding against slow references, closed forms, and averages over many draws."""

from __future__ import annotations

import math
import re
from typing import Any, Literal

import numpy as np
import pytest
import torch

from stillhouse.errors import SignalError
from stillhouse.signals.encode import Encoder, frozen_head_rows
from stillhouse.signals.encodings import (
    UNITS,
    EntryEncoding,
    Sampled,
    Stratified,
    Threshold,
    TopK,
    TopP,
    encoding_from_json,
    encoding_to_json,
)
from stillhouse.signals.selection import at_least, locate, probabilities, take_out_, top_tokens
from stillhouse.signals.tune_threshold import expected, top_probabilities, tune_threshold
from tests.signals import toys
from tests.signals.decoding import decode

UNBIASED = [
    Sampled(20),
    Stratified(4, 5),
    Stratified(4, 5, probability_bytes=2),
    Threshold(0.05),
    Threshold(0.02, probability_bytes=2),
]


def random_logits(rows: int, vocabulary: int, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    scale = torch.linspace(0.5, 6.0, rows)[:, None]  # from nearly flat to nearly certain
    return torch.randn(rows, vocabulary, generator=g) * scale


def uniforms_for(encoding: EntryEncoding, rows: int, seed: int = 1) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.rand(rows, encoding.draws_per_row, generator=g, dtype=torch.float64)


# --- selecting tokens ----------------------------------------------------------------------


@pytest.mark.parametrize("vocabulary", [7, 128, 300, 1000, 4096, 70_001])
def test_selection_matches_a_search_over_every_token(vocabulary: int) -> None:
    logits_nV = random_logits(9, vocabulary)
    blocks = probabilities(logits_nV, 1.0)
    p_nV = blocks.p_nV[:, :vocabulary].clone()
    torch.testing.assert_close(p_nV, logits_nV.softmax(1))
    found = at_least(blocks, 0.02)
    assert torch.stack([found.rows_X, found.ids_X], 1).tolist() == (p_nV >= 0.02).nonzero().tolist()
    values_nk, ids_nk = top_tokens(blocks, 5)
    assert torch.equal(values_nk, p_nV.topk(5).values)
    assert torch.equal(p_nV.gather(1, ids_nk), values_nk)

    take_out_(blocks, found)
    left_nV = p_nV.masked_fill(p_nV >= 0.02, 0.0).double()
    rows_D = torch.arange(9).repeat_interleave(20)
    shares_D = torch.rand(180, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    has_tail_D = left_nV.sum(1)[rows_D] > 0
    rows_D, shares_D = rows_D[has_tail_D], shares_D[has_tail_D]
    ids_D, _ = locate(blocks, rows_D, shares_D)
    for row, share, token in zip(rows_D.tolist(), shares_D.tolist(), ids_D.tolist(), strict=True):
        upto_V = left_nV[row].cumsum(0)
        goal, slack = share * float(upto_V[-1]), 1e-6
        assert float(upto_V[token]) > goal - slack
        assert float(upto_V[token] - left_nV[row, token]) <= goal + slack
        assert float(left_nV[row, token]) > 0


def test_tokens_with_probability_zero_are_never_selected() -> None:
    logits_nV = torch.full((2, 1000), -torch.inf)
    logits_nV[:, 998] = 0.0
    blocks = probabilities(logits_nV, 1.0)
    ids_D, _ = locate(blocks, torch.tensor([0, 1, 1]), torch.tensor([0.0, 0.5, 1 - 1e-16]).double())
    assert ids_D.tolist() == [998, 998, 998]
    assert int(top_tokens(blocks, 3)[1].max()) < 1000


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_not_finite_are_rejected(bad: float) -> None:
    logits_nV = random_logits(4, 300)
    logits_nV[2, 7] = bad
    with pytest.raises(SignalError, match="row 2"):
        Encoder(TopK(4), 300)(logits_nV, torch.empty(4, 0))


# --- encoding rows -------------------------------------------------------------------------


def systematic_by_hand(
    p_V: list[float], tau: float, units: int, u: list[float]
) -> tuple[list[int], list[int]]:
    """Threshold sampling of one row, token by token: the ids, and the values of the first ones."""
    exact = [token for token, p in enumerate(p_V) if p >= tau]
    whole, upto, before, values = math.fsum(p_V), 0.0, 0, []
    for token in exact:
        upto += p_V[token] / whole * units
        values.append(math.floor(upto + u[0]) - before)
        before += values[-1]
    tail = math.fsum(p for p in p_V if p < tau)
    draws = max(1, math.floor(tail / tau)) if sum(values) < units else 0
    ids, upto, token = [], 0.0, -1
    for draw in range(draws):
        while upto <= (draw + u[1]) / draws * tail:
            token += 1
            upto += p_V[token] if p_V[token] < tau else 0.0
        ids.append(token)
    return exact + ids, values


@pytest.mark.parametrize("probability_bytes", [1, 2])
def test_threshold_matches_a_token_by_token_reference(probability_bytes: Literal[1, 2]) -> None:
    logits_nV = random_logits(60, 300)
    encoding = Threshold(0.03, probability_bytes)
    u_nU = uniforms_for(encoding, 60)
    rows, _ = Encoder(encoding, 300)(logits_nV, u_nU)
    ids, values = iter(rows.low_E.tolist()), iter(rows.values_X.tolist())
    for p_V, u, count, valued in zip(
        logits_nV.softmax(1).double().tolist(),
        u_nU.tolist(),
        rows.counts_N.tolist(),
        rows.valued_N.tolist(),
        strict=True,
    ):
        ids_wanted, values_wanted = systematic_by_hand(p_V, 0.03, UNITS[probability_bytes], u)
        assert [next(ids) for _ in range(count)] == ids_wanted
        assert [next(values) for _ in range(valued)] == values_wanted


def test_top_k_keeps_the_most_likely_tokens_and_the_tail() -> None:
    logits_nV = random_logits(8, 300)
    rows, statistics = Encoder(TopK(6), 300)(logits_nV, torch.empty(8, 0))
    signal = decode(TopK(6), rows)
    wanted = logits_nV.log_softmax(1).topk(6)
    torch.testing.assert_close(signal.log_probs_NK, wanted.values, atol=2e-3, rtol=2e-3)
    assert torch.equal(signal.ids_NK.long(), wanted.indices)
    tail_n = 1 - wanted.values.exp().sum(1)
    torch.testing.assert_close(signal.tail_N, tail_n, atol=1e-6, rtol=0)
    assert statistics.mass == pytest.approx(float(wanted.values.exp().sum()), rel=1e-5)


def test_top_p_keeps_the_fewest_tokens_that_reach_the_probability() -> None:
    logits_nV = random_logits(8, 300)
    rows, _ = Encoder(TopP(0.7, most=30), 300)(logits_nV, torch.empty(8, 0))
    for count, p_V in zip(rows.counts_N.tolist(), logits_nV.softmax(1), strict=True):
        upto_V = p_V.sort(descending=True).values.cumsum(0)
        assert count == min(30, int((upto_V < 0.7).sum()) + 1)


def test_short_rows_are_padded_with_their_first_token() -> None:
    rows, _ = Encoder(TopP(0.7, most=30), 300)(random_logits(8, 300), torch.empty(8, 0))
    signal = decode(TopP(0.7, most=30), rows)
    past_NK = torch.arange(signal.ids_NK.shape[1]) >= torch.from_numpy(rows.counts_N)[:, None]
    assert past_NK.any()
    assert torch.equal(past_NK, signal.log_probs_NK == -torch.inf)
    assert torch.equal(signal.ids_NK[past_NK], signal.ids_NK[:, :1].expand_as(past_NK)[past_NK])


@pytest.mark.parametrize("encoding", UNBIASED, ids=repr)
def test_the_estimate_is_unbiased_with_the_stated_variance(encoding: EntryEncoding) -> None:
    """Over 4,000 encodings of a row, the mean is p and the variance matches the closed form."""
    repeats = 4000
    for logits_V in random_logits(4, 130, seed=5):
        p_V = logits_V.softmax(0)
        many_nV = logits_V.expand(repeats, -1)
        rows, statistics = Encoder(encoding, 130)(many_nV, uniforms_for(encoding, repeats))
        p_hat_nV = toys.estimate(decode(encoding, rows), 130)
        torch.testing.assert_close(p_hat_nV.sum(1), torch.ones(repeats))
        error_V = p_hat_nV.mean(0) - p_V
        deviation_V = p_hat_nV.std(0) / math.sqrt(repeats)
        assert float((error_V.abs() - 5 * deviation_V).max()) < 1e-4
        variance = float((p_hat_nV - p_V).square().sum(1).mean())
        assert variance == pytest.approx(statistics.variance / repeats, rel=0.15, abs=1e-7)


def test_top_k_renormalized_has_the_stated_bias() -> None:
    logits_nV = random_logits(20, 300)
    encoding = TopK(6, tail=False)
    rows, statistics = Encoder(encoding, 300)(logits_nV, torch.empty(20, 0))
    error_nV = toys.estimate(decode(encoding, rows), 300) - logits_nV.softmax(1)
    assert float(error_nV.square().sum()) == pytest.approx(statistics.squared_bias, rel=0.01)


def test_importance_weights_correct_for_the_proposal() -> None:
    """The draws come from q, but the mean of the weighted estimates is close to p."""
    encoding = Sampled(250, exponent=0.6)
    logits_V = random_logits(3, 40)[1]
    many_nV = logits_V.expand(800, -1)
    rows, _ = Encoder(encoding, 40)(many_nV, uniforms_for(encoding, 800))
    error_V = toys.estimate(decode(encoding, rows), 40).mean(0) - logits_V.softmax(0)
    assert float(error_V.abs().max()) < 0.003


def test_the_temperature_divides_the_logits() -> None:
    logits_nV = random_logits(8, 300)
    rows, _ = Encoder(TopK(6), 300, temperature=2.0)(logits_nV, torch.empty(8, 0))
    wanted, _ = Encoder(TopK(6), 300)(logits_nV / 2.0, torch.empty(8, 0))
    assert np.array_equal(rows.values_X, wanted.values_X)


def test_encoding_in_chunks_gives_the_same_rows() -> None:
    logits_nV, encoding = random_logits(50, 300), Threshold(0.04)
    u_nU = uniforms_for(encoding, 50)
    whole, _ = Encoder(encoding, 300)(logits_nV, u_nU)
    encoder = Encoder(encoding, 300)
    parts = [encoder(logits_nV[at : at + 7], u_nU[at : at + 7])[0] for at in range(0, 50, 7)]
    assert np.array_equal(np.concatenate([part.low_E for part in parts]), whole.low_E)
    assert np.array_equal(np.concatenate([part.values_X for part in parts]), whole.values_X)


def test_the_frozen_head_vector_determines_the_forward_kl() -> None:
    g = torch.Generator().manual_seed(0)
    logits_nV, weight_VD = random_logits(10, 60), torch.randn(60, 8, generator=g)
    hidden_nD = torch.randn(10, 8, generator=g)
    rows, _ = frozen_head_rows(logits_nV, weight_VD)
    vector_nD = torch.from_numpy(rows.bits_NW.view(np.int16)).view(torch.bfloat16).float()
    z_nV = hidden_nD @ weight_VD.T
    entropy_n = torch.from_numpy(rows.scalar_N)
    from_store_n = entropy_n - (vector_nD * hidden_nD).sum(1) + z_nV.logsumexp(1)
    log_p_nV = logits_nV.log_softmax(1)
    kl_n = (log_p_nV.exp() * (log_p_nV - z_nV.log_softmax(1))).sum(1)
    torch.testing.assert_close(from_store_n, kl_n, atol=0.05, rtol=0.01)


# --- settings ------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", toys.ENTRY_ENCODINGS, ids=repr)
def test_json_restores_the_encoding(encoding: EntryEncoding) -> None:
    assert encoding_from_json(encoding_to_json(encoding)) == encoding


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        ({"kind": "top_q"}, "unknown encoding 'top_q'"),
        ({"kind": "top_k", "n": 3}, "parameters"),
        ({"kind": "top_k", "k": 300}, "from 1 to 254"),
        ({"kind": "threshold", "tau": 0.0}, "threshold.tau"),
    ],
)
def test_invalid_settings_are_rejected(raw: dict[str, Any], said: str) -> None:
    with pytest.raises(SignalError, match=said):
        encoding_from_json(raw)


@pytest.mark.parametrize("wanted", [{"entries": 12.0}, {"size": 30.0}])
def test_tuning_finds_tau_for_a_requested_size(wanted: dict[str, Any]) -> None:
    logits_nV = random_logits(400, 2000)
    tuned = tune_threshold(top_probabilities(logits_nV), 2000, **wanted)
    found = tuned.entries_per_row if "entries" in wanted else tuned.bytes_per_row
    assert found == pytest.approx(next(iter(wanted.values())), rel=0.02)
    rows, _ = Encoder(tuned.encoding, 2000)(logits_nV, uniforms_for(tuned.encoding, 400))
    assert float(rows.counts_N.mean()) == pytest.approx(tuned.entries_per_row, rel=0.02)


def test_threshold_has_a_lower_variance_than_the_same_size_for_every_row() -> None:
    """The reason for `threshold`: at the same total size, its total variance is lower."""
    logits_nV = random_logits(300, 2000)
    tuned = tune_threshold(top_probabilities(logits_nV), 2000, entries=12.0)
    _, ours = Encoder(tuned.encoding, 2000)(logits_nV, uniforms_for(tuned.encoding, 300))
    for k in (2, 4, 6, 8, 10):
        other = Stratified(k, 12 - k)
        _, theirs = Encoder(other, 2000)(logits_nV, uniforms_for(other, 300))
        assert ours.variance < theirs.variance


def test_a_size_that_no_tau_reaches_is_rejected() -> None:
    sample_nK = top_probabilities(random_logits(50, 300))
    with pytest.raises(SignalError, match="1000 entries per row are not possible") as caught:
        tune_threshold(sample_nK, 300, entries=1000.0)
    range_ = re.fullmatch(r"choose a number from (.+) to (.+)", str(caught.value.fix))
    assert range_ is not None
    for entries in range_.groups():
        tune_threshold(sample_nK, 300, entries=float(entries))
    assert expected(sample_nK, Threshold(0.05), 300).entries_per_row < 21

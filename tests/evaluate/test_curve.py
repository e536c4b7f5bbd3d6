"""Tokens that would reach a KL, by a power law through measured points."""

from __future__ import annotations

import numpy as np
import pytest

from stillhouse.errors import DataError
from stillhouse.evaluate.power_law import fit_power_law

TOKENS = [10_000 * n for n in range(1, 13)]


def test_an_exact_power_law_is_found_and_inverted() -> None:
    law = fit_power_law([(n, 50.0 * n**-0.3) for n in TOKENS])
    assert law.exponent == pytest.approx(0.3)
    assert law.at(1e6) == pytest.approx(50.0 * 1e6**-0.3)
    reach = law.reach(50.0 * 1.2e7**-0.3)
    assert reach.tokens == pytest.approx(1.2e7, rel=1e-6)
    assert reach.extrapolated == pytest.approx(100.0, rel=1e-6)
    assert reach.low == pytest.approx(reach.high, rel=1e-6)


def test_the_interval_holds_the_truth_about_as_often_as_it_says_and_widens_with_the_reach() -> None:
    held, wider = {2e5: 0, 2e7: 0}, 0
    for seed in range(40):
        noise = np.random.default_rng(seed).normal(0, 0.01, len(TOKENS))
        law = fit_power_law(
            [(n, 50.0 * n**-0.3 * np.exp(e)) for n, e in zip(TOKENS, noise, strict=True)]
        )
        near, far = (law.reach(50.0 * n**-0.3) for n in held)
        for truth, reach in zip(held, (near, far), strict=True):
            held[truth] += reach.low < truth < reach.high
        wider += far.high / far.low > near.high / near.low
    assert all(27 <= times <= 40 for times in held.values())
    assert wider == 40


def test_the_first_points_are_warmup_and_do_not_count() -> None:
    warm = [(n, 10.0 if n <= 40_000 else 50.0 * n**-0.3) for n in TOKENS]
    assert fit_power_law(warm).exponent == pytest.approx(0.3)


def test_what_no_curve_fits_is_refused() -> None:
    with pytest.raises(DataError, match="too few"):
        fit_power_law([(1, 2.0), (2, 1.0), (3, 0.5)])
    with pytest.raises(DataError, match="does not fall"):
        fit_power_law([(n, 1.0 + n * 1e-6) for n in TOKENS])

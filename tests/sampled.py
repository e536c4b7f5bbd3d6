"""Tests of every combination of some settings, of which `make test` runs a sample."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from itertools import product

import pytest


def sampled(names: str, *axes: Mapping[str, object], fast: Collection[str]) -> pytest.MarkDecorator:
    """Parametrize a test with every combination of the axes' values; all but `fast` are slow.

    Each axis maps ids to values. fast: ids of combinations, with a hyphen between the axes' ids.
    """
    cases = []
    for chosen in product(*(axis.items() for axis in axes)):
        name = "-".join(key for key, _ in chosen)
        marks = () if name in fast else (pytest.mark.slow,)
        cases.append(pytest.param(*(value for _, value in chosen), id=name, marks=marks))
    assert set(fast) <= {case.id for case in cases}
    return pytest.mark.parametrize(names, cases)

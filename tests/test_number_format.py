"""Numbers formatted for people."""

from __future__ import annotations

import math
from typing import Any

import pytest

from stillhouse import number_format as text


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (text.digits(0.4812), "0.481"),
        (text.digits(171.2), "171"),
        (text.digits(1013.4), "1,013"),
        (text.digits(0), "0"),
        (text.digits(math.nan), "not finite"),
        (text.digits(9.999), "10.0"),
        (text.tiny(0.0000123), "1.23 × 10⁻⁵"),
        (text.count(107_961_408), "108.0M"),
        (text.count(61_320), "61,320"),
        (text.count(7_240_000_000), "7.240B"),
        (text.size(215_922_816), "216 MB"),
        (text.size(12), "12 bytes"),
        (text.percent(0.8026), "80%"),
        (text.percent(0.662, 1), "66.2%"),
        (text.seconds(3.2), "3.2 s"),
        (text.seconds(59.7), "1 min 00 s"),
        (text.seconds(302.7), "5 min 03 s"),
        (text.seconds(3_900), "1 h 05 min"),
        (text.flops(5.62e13), "5.62 × 10¹³"),
        (text.flops(0), "–"),
        (text.label("ffn_size"), "FFN size"),
        (text.label("removed_layers"), "Removed layers"),
    ],
)
def test_numbers_are_formatted_for_people(shown: str, expected: str) -> None:
    assert shown.replace(text.NBSP, " ") == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ([0, 1, 2, 5, 7, 8], "0–2, 5, 7, 8"),
        ([], "none"),
        (None, "none"),
        (True, "yes"),
        (1024, "1,024"),
        (["a", "b"], "a, b"),
        ({"ffn_size": 3}, "FFN size: 3"),
    ],
)
def test_values_of_any_type_are_described(value: Any, expected: str) -> None:
    assert text.describe(value) == expected

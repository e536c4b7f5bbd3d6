"""Reads the verdict out of a judge's reply. A reply that is not clear has none."""

from __future__ import annotations

import re

_LETTER = re.compile(r"\b(?:(?:[Aa] )?(?:tie|Tie|TIE)|A|B)\b")
"""In capitals: `a` is mostly the article."""
_SCALE = re.compile(
    r"(?:/|\bout of|\bof) *10\b|(?:\bfrom|\bof|\bscale:?|\() *1 *(?:to|-|–) *10\b", re.IGNORECASE
)
_NUMBER = re.compile(r"(?<![\d.,-])\d+(?:\.\d+)?(?![\d%])")


def read_verdict(text: str) -> str | None:
    """A, B or tie; None if the reply is not exactly one of them."""
    found = {word if word in "AB" else "tie" for word in _LETTER.findall(text)}
    return found.pop() if len(found) == 1 else None


def read_score(text: str) -> float | None:
    """The one number from 1 to 10 in the reply, besides the scale that it may repeat."""
    found = {float(number) for number in _NUMBER.findall(_SCALE.sub(" ", text))}
    score = found.pop() if len(found) == 1 else 0.0
    return score if 1 <= score <= 10 else None

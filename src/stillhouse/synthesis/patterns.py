"""Regular expressions in a recipe: a search that takes too long is an error, never a hang.

Python's own `re` cannot be stopped; `regex` reads the same expressions and has a time limit.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import regex

from stillhouse.errors import RecipeError

SECONDS = 1.0
"""Processor time for one text, in which any expression without runaway repetition is done."""
_PROBE_SECONDS = 0.2
_REPEATED = 64
"""Characters of a probe: an expression that doubles its work with each needs 2^64 steps."""


@dataclass(frozen=True)
class Pattern:
    """where: the recipe's key. Searching raises RecipeError if it takes more than SECONDS."""

    compiled: Any
    where: str

    def search(self, text: str, *, seconds: float = SECONDS) -> Any:
        """The first match; None if there is none."""
        return next(self.matches(text, seconds=seconds), None)

    def matches(self, text: str, *, seconds: float = SECONDS) -> Iterator[Any]:
        try:
            yield from self.compiled.finditer(text, timeout=seconds)
        except TimeoutError:
            raise RecipeError(
                f"the regular expression {self.compiled.pattern!r} takes more than {seconds:g} s "
                f"for a text of {len(text):,} characters",
                where=self.where,
                fix="write it without a repetition inside a repetition, such as (a+)+ or (a|a)*; "
                "answers that arrived are kept",
            ) from None


def compiled_pattern(expression: str, where: str) -> Pattern:
    """Raises RecipeError for an invalid regular expression, and for one that takes too long on a
    short text of a character that occurs in it."""
    try:
        re.compile(expression)
        found = Pattern(regex.compile(expression), where)
    except (re.error, regex.error, RecursionError, OverflowError) as error:
        raise RecipeError(
            f"{expression!r} is not a regular expression: {error}",
            where=where,
            fix="correct it; a backslash makes the next character literal: \\( \\[ \\.",
        ) from None
    for character in dict.fromkeys([*"a0 ", *expression][:_REPEATED]):
        found.search(character * _REPEATED + "\0", seconds=_PROBE_SECONDS)
    return found

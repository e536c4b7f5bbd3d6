"""Runs a recipe's regular expressions with a time limit, so that a slow search is an error, not a
hang.

Python's `re` cannot be stopped; `regex` accepts the same expressions and has a time limit.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import regex

from stillhouse.errors import RecipeError

SECONDS = 1.0
"""Time limit per text, which is enough for any expression without catastrophic backtracking."""
_PROBE_SECONDS = 0.2
_REPEATED = 64
"""Characters in a probe. An expression whose work doubles with each character takes 2^64 steps."""


@dataclass(frozen=True)
class Pattern:
    """A compiled expression. where: the recipe's key.

    Searching raises RecipeError if it takes more than SECONDS.
    """

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
                fix="rewrite it without nested repetition, such as (a+)+ or (a|a)*; answers that "
                "arrived are kept",
            ) from None


def compiled_pattern(expression: str, where: str) -> Pattern:
    """Compile a regular expression.

    Raises RecipeError if it is invalid, or takes too long on a short text that repeats one of its
    characters.
    """
    try:
        re.compile(expression)
        found = Pattern(regex.compile(expression), where)
    except (re.error, regex.error, RecursionError, OverflowError) as error:
        raise RecipeError(
            f"{expression!r} is not a regular expression: {error}",
            where=where,
            fix="correct it; escape literal special characters with a backslash: \\( \\[ \\.",
        ) from None
    for character in dict.fromkeys([*"a0 ", *expression][:_REPEATED]):
        found.search(character * _REPEATED + "\0", seconds=_PROBE_SECONDS)
    return found

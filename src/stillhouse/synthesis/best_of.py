"""Chooses the best of several answers, by majority or by likelihood under the teacher."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from decimal import Decimal, InvalidOperation, localcontext

from stillhouse.data import words
from stillhouse.synthesis.filters import Chooser, Row, answer_only
from stillhouse.synthesis.patterns import Pattern, compiled_pattern

_AROUND = " \t\n.,;:!?\"'`*_()[]{}<>$"
"""Characters that are ignored at the ends of an answer; a minus or % sign is not."""
_MOST_DIGITS = 10_000
"""Maximum digits of a text that is compared as a number: with an exponent, a few characters can
stand for millions of digits."""


def majority(
    pattern: str | None, where: str, *, least: float = 0.0, keep_all: bool = False
) -> Chooser:
    """Keep the answers that agree with the majority: the first of them, or all.

    The last match of the pattern, or its first group, is normalized and compared. Ties go to the
    value that came first. where: the recipe's key. least: the share of the answers that must agree.
    Raises RecipeError for an invalid regular expression.
    """
    compiled = None if pattern is None else compiled_pattern(pattern, where)

    def choose(rows: Sequence[Row]) -> list[str | None]:
        values = [compared_value(answer_only(row), compiled) for row in rows]
        votes = Counter(value for value in values if value is not None)
        if not votes:
            return [f"nothing in it matches {pattern!r}" for _ in rows]
        winner, count = votes.most_common(1)[0]  # of equal ones, the first that was counted
        first = values.index(winner)
        enough = count >= least * len(rows)
        reasons: list[str | None] = []
        for number, value in enumerate(values):
            if value is None:
                reasons.append(f"nothing in it matches {pattern!r}")
            elif not enough:
                reasons.append(f"fewer than {least:.0%} agree: {dict(votes)}"[:200])
            elif value != winner:
                reasons.append(
                    f"its answer is {value!r}, and {count} of {len(rows)} are {winner!r}"[:200]
                )
            elif number != first and not keep_all:
                reasons.append("it is the same as an earlier answer")
            else:
                reasons.append(None)
        return reasons

    return choose


def compared_value(text: str, pattern: Pattern | None) -> str | None:
    """Return the part of an answer to compare, normalized; None if nothing matches."""
    if pattern is None:
        return normalized(text)
    found = None
    for match in pattern.matches(text):
        found = match.group(1) if pattern.compiled.groups else match.group()
    return None if found is None else normalized(found)


def normalized(text: str) -> str:
    """Like `words.normalized`, but without punctuation at the ends, and 1,000.0 becomes 1000."""
    plain = words.normalized(text).strip(_AROUND)
    number = re.sub(r"(?<=\d),(?=\d{3}(?:\D|$))", "", plain)
    try:
        value = Decimal(number)
    except InvalidOperation:
        return plain
    if not value.is_finite() or abs(value.adjusted()) > _MOST_DIGITS:
        return plain
    with localcontext(prec=len(number)):  # every digit counts
        return format(value.normalize() if value else Decimal(0), "f")


def likelihood() -> Chooser:
    """Keep the answer with the highest mean log-probability per token; ties go to the first."""
    return lambda rows: keep_best(
        [row.likelihood for row in rows],
        "the teacher gave no log-probabilities",
        "mean log-probability {:.4f}, and the best has {:.4f}",
    )


def keep_best(points: Sequence[float | None], without: str, fewer: str) -> list[str | None]:
    """Reasons to drop all answers but the one with the highest score; ties go to the first.

    without: the reason if there is no score. fewer: the reason if the score is below the best.
    """
    best = max((one for one in points if one is not None), default=None)
    kept = None if best is None else points.index(best)
    return [
        None if number == kept else without if one is None else fewer.format(one, best)
        for number, one in enumerate(points)
    ]

"""Quality of answers: JSON by its schema and fields, free text by equality and comparison."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from stillhouse.data.words import collapsed, normalized
from stillhouse.evaluation.results import Saved

Facts = Counter[tuple[str, str]]
"""Of a JSON value: (path, scalar) of everything in it, and how often."""


@dataclass(frozen=True)
class AnswersResult:
    """One model on the test texts. figures: measures by name. fields: F1 of each top-level field,
    against the reference answers or, where there are none, the teacher's."""

    role: str
    figures: dict[str, float]
    fields: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class AnsweredText:
    """Every model's answer, by role. gold: the reference answer, None where there is none."""

    text: str
    gold: str | None
    answers: dict[str, str]


@dataclass(frozen=True)
class AnswersEvaluation(Saved):
    kind: str
    texts: int
    results: list[AnswersResult]
    examples: list[AnsweredText]
    notes: list[str] = field(default_factory=list)

    def of(self, role: str) -> AnswersResult | None:
        return next((result for result in self.results if result.role == role), None)


def facts_of(value: Any, path: str = "") -> Facts:
    """(path, scalar) of everything in a JSON value. A list's items have one path, so that their
    order does not matter. Text is compared without case and repeated spaces, numbers by their
    value; null is no fact."""
    if isinstance(value, Mapping):
        inside = (
            facts_of(part, f"{path}.{collapsed(str(key))}" if path else collapsed(str(key)))
            for key, part in value.items()
        )
        return sum(inside, Counter())
    if isinstance(value, list):
        return sum((facts_of(part, f"{path}[]") for part in value), Counter())
    if value is None:
        return Counter()
    if isinstance(value, bool):
        shown = "true" if value else "false"
    elif isinstance(value, int | float):
        shown = repr(float(value)) if math.isfinite(value) else str(value)
    else:
        shown = f'"{normalized(str(value))}"'
    return Counter({(path, shown): 1})


def field_f1(answers: Sequence[Any | None], gold: Sequence[Any]) -> tuple[float, dict[str, float]]:
    """F1 over all facts, and of each top-level field's. answers: None where one is not valid JSON,
    and so has no facts. 1 where neither side has any."""
    right: Counter[str] = Counter()
    total: Counter[str] = Counter()
    for one, other in zip(answers, gold, strict=True):
        ours = Counter() if one is None else facts_of(one)
        theirs = facts_of(other)
        for counts, counted in (((ours & theirs), right), (ours, total), (theirs, total)):
            for (path, _), times in counts.items():
                counted[_field(path)] += times

    def f1(both: int, either: int) -> float:
        return 2 * both / either if either else 1.0

    fields = {name: f1(right[name], total[name]) for name in sorted(total)}
    return f1(right.total(), total.total()), fields


def _field(path: str) -> str:
    return path.partition(".")[0].removesuffix("[]")


def same_text(one: str, other: str) -> bool:
    """Equal up to whitespace and Unicode form."""
    return collapsed(one) == collapsed(other)


@dataclass(frozen=True)
class Comparison:
    """Answers compared with others, each pair in both orders. An answer wins where it is preferred
    in both; a verdict that depends on the order is a tie. unread: pairs without two readable
    verdicts."""

    wins: int
    ties: int
    losses: int
    consistent: int
    unread: int

    @property
    def preferred(self) -> float:
        """Wins, and half of the ties, among the pairs that were read."""
        return (self.wins + self.ties / 2) / max(1, self.wins + self.ties + self.losses)


def compare(verdicts: Sequence[tuple[str | None, str | None]]) -> Comparison:
    """verdicts: A, B or tie, None where nothing could be read; of each pair with our answer as A,
    then with our answer as B."""
    points = {"A": 1, "tie": 0, "B": -1}
    counts: Counter[str] = Counter()
    for first, second in verdicts:
        if first is None or second is None:
            counts["unread"] += 1
            continue
        ours, swapped = points[first], -points[second]
        counts["consistent"] += ours == swapped
        verdict = ours if ours == swapped else 0
        counts[{1: "wins", 0: "ties", -1: "losses"}[verdict]] += 1
    return Comparison(*(counts[name] for name in Comparison.__dataclass_fields__))

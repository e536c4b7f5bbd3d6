"""Quality of answers: JSON by its fields, free text by equality and by comparison."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from stillhouse.data.words import collapsed, normalized
from stillhouse.evaluation.assignment import largest_total
from stillhouse.evaluation.results import Saved

Facts = Counter[tuple[str, str]]
"""A JSON value's facts: the (path, scalar) pairs of everything in it, with counts."""


@dataclass(frozen=True)
class AnswersResult:
    """One model's results on the test texts.

    figures: metrics by name.
    fields: F1 of each top-level field, against the reference answers or, if there are none, the
        teacher's answers.
    """

    role: str
    figures: dict[str, float]
    fields: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class AnsweredText:
    """A test text with every model's answer, by role. gold: the reference answer, if there is
    one."""

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
    """The (path, scalar) pairs of everything in a JSON value; null is not a fact. Text is compared
    regardless of case and repeated spaces, and numbers by value."""
    if isinstance(value, Mapping):
        inside = (
            facts_of(part, f"{path}.{collapsed(str(key))}" if path else collapsed(str(key)))
            for key, part in value.items()
        )
        return sum(inside, Counter())
    if isinstance(value, list):
        return sum((facts_of(part, f"{path}[]") for part in value), Counter())
    return Counter() if value is None else Counter({(path, _scalar(value, normalized)): 1})


def _scalar(value: Any, text: Callable[[str], str]) -> str:
    """A string that is equal for equal values. true is not 1, and "1" is not 1, but 1.0 is."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return f'"{text(value)}"'
    if isinstance(value, int | float) and abs(value) > 2**53 and abs(value) != math.inf:
        return str(int(value))  # As floats, different integers could be equal.
    return repr(value + 0.0) if isinstance(value, int | float) else str(value)


def shared_facts(one: Any, other: Any) -> int:
    """The number of facts that two JSON values have in common.

    The order of a list does not matter. Each item is paired with at most one item of the other
    list, so that facts of different items are not combined; the pairing with the most facts in
    common counts.
    """
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        ours, theirs = _by_name(one), _by_name(other)
        return sum(shared_facts(ours[key], theirs[key]) for key in ours if key in theirs)
    if isinstance(one, list) and isinstance(other, list):
        if not any(isinstance(item, Mapping | list) for item in (*one, *other)):
            return (facts_of(one) & facts_of(other)).total()
        scores = [[shared_facts(ours, theirs) for theirs in other] for ours in one]
        return largest_total(np.array(scores, np.int64).reshape(len(one), len(other)))
    if isinstance(one, Mapping | list) or isinstance(other, Mapping | list):
        return 0
    return (facts_of(one) & facts_of(other)).total()


def _by_name(value: Mapping[str, Any]) -> Mapping[str, Any]:
    """The object with `collapsed` keys, unless that makes two of them the same."""
    named = {collapsed(str(key)): item for key, item in value.items()}
    return named if len(named) == len(value) else value


def field_f1(answers: Sequence[Any | None], gold: Sequence[Any]) -> tuple[float, dict[str, float]]:
    """F1 over all facts, and F1 of each top-level field: 2 × shared facts / facts of both sides.

    If neither side has any facts, F1 over all facts is the fraction of valid answers instead.

    answers: None for an answer that is not valid JSON, and so has no facts.
    """
    right: Counter[str] = Counter()
    total: Counter[str] = Counter()
    for one, other in zip(answers, gold, strict=True):
        ours, theirs = _fields(one), _fields(other)
        for name in {*ours, *theirs}:
            right[name] += shared_facts(ours.get(name), theirs.get(name))
            total[name] += facts_of(ours.get(name)).total() + facts_of(theirs.get(name)).total()
    fields = {name: 2 * right[name] / total[name] for name in sorted(total) if total[name]}
    if not total.total():
        return sum(one is not None for one in answers) / max(1, len(answers)), fields
    return 2 * right.total() / total.total(), fields


def _fields(value: Any) -> Mapping[str, Any]:
    return _by_name(value) if isinstance(value, Mapping) else {"": value}


def same_json(one: Any, other: Any) -> bool:
    """Whether two JSON values are the same: the same fields, lists in the same order, numbers equal
    by value, and text and field names equal up to whitespace and Unicode normalization. Case
    matters, and null is different from a missing field."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        one, other = _by_name(one), _by_name(other)
        return one.keys() == other.keys() and all(same_json(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same_json, one, other))
    if isinstance(one, Mapping | list) or isinstance(other, Mapping | list):
        return False
    return _scalar(one, collapsed) == _scalar(other, collapsed)


def same_text(one: str, other: str) -> bool:
    """Whether two texts are equal up to whitespace and Unicode normalization."""
    return collapsed(one) == collapsed(other)


@dataclass(frozen=True)
class Comparison:
    """Pairwise comparison of our answers with others, each pair in both orders.

    An answer wins if it is preferred in both orders. If the verdict depends on the order, the pair
    is a tie.

    consistent: pairs with the same verdict in both orders.
    unread: pairs without two readable verdicts.
    """

    wins: int
    ties: int
    losses: int
    consistent: int
    unread: int

    @property
    def preferred(self) -> float:
        """Wins plus half of the ties, as a fraction of the pairs with readable verdicts."""
        return (self.wins + self.ties / 2) / max(1, self.wins + self.ties + self.losses)


def compare(verdicts: Sequence[tuple[str | None, str | None]]) -> Comparison:
    """Count wins, ties, and losses.

    verdicts: for each pair, the verdict with our answer as A, and then with our answer as B: "A",
        "B", or "tie"; None if unreadable.
    """
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

"""How good answers are: JSON by its schema and its fields, free text by equality and comparison."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

Facts = Counter[tuple[str, str]]
"""Of a JSON value: (path, scalar) of everything in it, and how often."""


@dataclass(frozen=True)
class AnswersResult:
    """One model on the test texts. figures: measures by name. fields: F1 of each top-level field,
    against the true answers or, where there are none, the teacher's."""

    role: str
    figures: dict[str, float]
    fields: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class AnsweredText:
    """What every model answered, by role. gold: the true answer, None where it is not known."""

    text: str
    gold: str | None
    answers: dict[str, str]


@dataclass(frozen=True)
class AnswersEvaluation:
    kind: str
    texts: int
    results: list[AnswersResult]
    examples: list[AnsweredText]
    notes: list[str] = field(default_factory=list)

    def of(self, role: str) -> AnswersResult | None:
        return next((result for result in self.results if result.role == role), None)

    def save(self, path: Path) -> None:
        text = json.dumps(asdict(self), indent=1, ensure_ascii=False)
        path.write_text(text, encoding="utf-8")

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> AnswersEvaluation:
        results = [AnswersResult(**result) for result in raw["results"]]
        examples = [AnsweredText(**example) for example in raw["examples"]]
        return cls(**{**raw, "results": results, "examples": examples})

    @classmethod
    def load(cls, path: Path) -> AnswersEvaluation:
        return cls.from_dict(json.loads(path.read_text(encoding="utf-8")))


# --- JSON --------------------------------------------------------------------------------------


def facts_of(value: Any, path: str = "") -> Facts:
    """A list's items have one path, so that their order does not matter. Text is compared without
    case and repeated spaces, numbers by their value; null is no fact."""
    if isinstance(value, Mapping):
        inside = (
            facts_of(part, f"{path}.{key}" if path else str(key)) for key, part in value.items()
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
        shown = f'"{" ".join(str(value).casefold().split())}"'
    return Counter({(path, shown): 1})


def field_f1(said: Sequence[Any | None], true: Sequence[Any]) -> tuple[float, dict[str, float]]:
    """F1 over all facts, and of each top-level field's. said: None where an answer is no valid
    JSON, which says nothing. 1 where there was nothing to say and nothing was said."""
    right: Counter[str] = Counter()
    total: Counter[str] = Counter()
    for one, other in zip(said, true, strict=True):
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


# --- text --------------------------------------------------------------------------------------


def same_text(one: str, other: str) -> bool:
    """Spaces and line ends aside."""
    return one.split() == other.split()


@dataclass(frozen=True)
class Comparison:
    """Answers compared with others, each pair in both orders. An answer wins where it is preferred
    in both; what depends on the order is a tie. unread: pairs of which a verdict was none."""

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

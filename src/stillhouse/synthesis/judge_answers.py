"""A judge among several answers to one prompt: a model is asked, and its verdicts are journaled.

Scores: one request an answer. Pairs: each pair twice, in either order, so that a judge that likes
what it reads first (or last) likes both alike.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from stillhouse.generation.journal import Journal
from stillhouse.generation.request import Request
from stillhouse.synthesis.filters import Row, answer_only
from stillhouse.synthesis.filters_config import FiltersRecipe, JudgeChoice
from stillhouse.synthesis.prompts import answer_text, text_of
from stillhouse.synthesis.synthesize_config import SynthesizeRecipe
from stillhouse.synthesis.text_teacher import Origins, TextSource, text_teacher

_SCORE = """\
Rate the answer to a question.

[Question]
{question}

[Answer]
{answer}

[What a good answer is]
{criteria}

Reply with one whole number from 1 (worst) to 10 (best) and nothing else."""
_PAIR = """\
Compare two answers to a question.

[Question]
{question}

[Answer A]
{first}

[Answer B]
{second}

[What a good answer is]
{criteria}

Reply with A or B, whichever is better, and nothing else."""
_ROLES = ("system", "developer", "user", "assistant", "tool")


@dataclass(frozen=True)
class Judge:
    section: JudgeChoice
    teacher: TextSource

    def requests(self, rows: Sequence[Row]) -> Iterator[Request]:
        """What the judge is asked about the answers to one prompt; nothing about a single one."""
        if len(rows) < 2:
            return
        if self.section.compare == "scores":
            yield from (self._score(row) for row in rows)
        else:
            for one, other in itertools.permutations(rows, 2):
                yield self._pair(one, other)

    def chooser(self, journal: Journal) -> Callable[[Sequence[Row]], list[str | None]]:
        """Keeps the answer with the most points, by the verdicts in the journal; the first of
        equals. An answer without a verdict is never kept."""

        def choose(rows: Sequence[Row]) -> list[str | None]:
            if len(rows) < 2:
                return [None for _ in rows]
            of = self._scores if self.section.compare == "scores" else self._wins
            points = of(rows, journal)
            known = [p for p in points if p is not None]
            if not known:
                return ["the judge gave no verdict" for _ in rows]
            best = points.index(max(known))
            return [
                None if number == best else _reason(point, max(known))
                for number, point in enumerate(points)
            ]

        return choose

    def _scores(self, rows: Sequence[Row], journal: Journal) -> list[float | None]:
        points: list[float | None] = []
        for row in rows:
            verdict = self._verdict(self._score(row), journal, r"(?<![\d.])(10|[1-9])(?![\d])")
            points.append(None if verdict is None else float(verdict))
        return points

    def _wins(self, rows: Sequence[Row], journal: Journal) -> list[float | None]:
        """Half a point for each of a pair's two comparisons that an answer wins."""
        points: list[float | None] = [None for _ in rows]
        for one, other in itertools.permutations(range(len(rows)), 2):
            request = self._pair(rows[one], rows[other])
            verdict = self._verdict(request, journal, r"\b([AB])\b")
            if verdict is None:
                continue
            for number, won in ((one, verdict == "A"), (other, verdict == "B")):
                points[number] = (points[number] or 0.0) + 0.5 * won
        return points

    def _verdict(self, request: Request, journal: Journal, pattern: str) -> str | None:
        answer = journal.get(request.key)
        if answer is None:
            return None
        found = re.search(pattern, answer_text(answer, keep_reasoning=False))
        return found.group(1) if found else None

    def _score(self, row: Row) -> Request:
        return self._request(_SCORE.format(**self._shown(row), answer=answer_only(row)))

    def _pair(self, first: Row, second: Row) -> Request:
        answers = {"first": answer_only(first), "second": answer_only(second)}
        return self._request(_PAIR.format(**self._shown(first), **answers))

    def _shown(self, row: Row) -> dict[str, str]:
        return {"question": text_of(row.messages, _ROLES), "criteria": self.section.criteria}

    def _request(self, text: str) -> Request:
        return self.teacher.request(({"role": "user", "content": text},), 0)


def _reason(point: float | None, best: float) -> str:
    if point is None:
        return "the judge gave no verdict"
    return f"the judge gives it {point:g}, and the best {best:g}"


def open_judge(
    section: SynthesizeRecipe, origins: Origins, seed: int, *, weights: bool = True
) -> Judge | None:
    """The recipe's judge; None where it chooses otherwise. weights: as in `text_teacher`."""
    choice = section.filters.best_of
    if not isinstance(choice, JudgeChoice):
        return None
    asked = {
        "teacher": choice.teacher,
        "sampling": choice.sampling,
        "budget": choice.budget,
        "filters": FiltersRecipe(),
    }
    judging = section.model_copy(update=asked)
    return Judge(choice, text_teacher(judging, origins, seed, weights=weights))


def most_requests(section: SynthesizeRecipe, requests: int) -> int:
    """How often the judge is asked at most, where the teacher is asked `requests` times."""
    choice = section.filters.best_of
    if not isinstance(choice, JudgeChoice):
        return 0
    return requests * (section.prompts.samples - 1 if choice.compare == "pairs" else 1)


@dataclass(frozen=True)
class Verdicts:
    """All that the judge is asked about groups of answers, each time they are gone through."""

    judge: Judge
    groups: Callable[[], Iterable[list[Row]]]

    def requests(self) -> Iterator[Request]:
        for group in self.groups():
            yield from self.judge.requests(group)

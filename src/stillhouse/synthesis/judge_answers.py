"""Judges several answers to a prompt: by majority, by likelihood under the teacher, or by a model.

A model's verdicts are kept in the journal. With scores, there is one request per answer. With
pairs, each pair is compared in both orders, so that a preference for the first (or last) position
cancels out.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation, localcontext

from stillhouse.data import words
from stillhouse.generation.answer_requests import send_missing
from stillhouse.generation.chat_frame import answer_text, text_of, user_turn
from stillhouse.generation.estimate import Estimate, estimate_requests
from stillhouse.generation.journal import Journal
from stillhouse.generation.request import Request
from stillhouse.generation.text_teacher import DefaultModel, TextSource, text_source
from stillhouse.synthesis.filters import Chooser, Row, answer_only
from stillhouse.synthesis.patterns import Pattern, compiled_pattern
from stillhouse.synthesis.synthesize_config import Choice, JudgeChoice

_AROUND = " \t\n.,;:!?\"'`*_()[]{}<>$"
"""Characters that are ignored at the ends of an answer; a minus or % sign is not."""
_MOST_DIGITS = 10_000
"""Maximum digits of a text that is compared as a number: with an exponent, a few characters can
stand for millions of digits."""
_LETTER = re.compile(r"\b(?:(?:[Aa] )?(?:tie|Tie|TIE)|A|B)\b")
"""Upper case only, because `a` is mostly the article."""
_SCALE = re.compile(
    r"(?:/|\bout of|\bof) *10\b|(?:\bfrom|\bof|\bscale:?|\() *1 *(?:to|-|–) *10\b", re.IGNORECASE
)
_NUMBER = re.compile(r"(?<![\d.,-])\d+(?:\.\d+)?(?![\d%])")


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
        # Of equal ones, the first that was counted.
        winner, count = next(iter(votes.most_common(1)), (None, 0))

        def reason(number: int, value: str | None) -> str | None:
            if value is None:
                return f"nothing in it matches {pattern!r}"
            if count < least * len(rows):
                return f"fewer than {least:.0%} agree: {dict(votes)}"[:200]
            if value != winner:
                return f"its answer is {value!r}, and {count} of {len(rows)} are {winner!r}"[:200]
            repeated = value in values[:number]
            return "it is the same as an earlier answer" if repeated and not keep_all else None

        return [reason(number, value) for number, value in enumerate(values)]

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


# --- a model ------------------------------------------------------------------------------------


def read_verdict(text: str) -> str | None:
    """Parse a verdict: `A`, `B`, or `tie`; None if the reply does not name exactly one of them."""
    found = {word if word in "AB" else "tie" for word in _LETTER.findall(text)}
    return found.pop() if len(found) == 1 else None


def read_score(text: str) -> float | None:
    """Parse the only number from 1 to 10 in the reply, ignoring a repeated scale ("out of 10")."""
    found = {float(number) for number in _NUMBER.findall(_SCALE.sub(" ", text))}
    score = found.pop() if len(found) == 1 else 0.0
    return score if 1 <= score <= 10 else None


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

    def requests(self, groups: Iterable[Sequence[Row]]) -> Iterator[Request]:
        """Yield the requests about the answers to each prompt; a single answer needs none."""
        for rows in groups:
            if len(rows) < 2:
                continue
            if self.section.compare == "scores":
                yield from map(self._score, rows)
            else:
                for one, other in itertools.permutations(rows, 2):
                    yield self._pair(one, other)

    def judge(
        self, groups: Callable[[], Iterable[Sequence[Row]]], journal: Journal
    ) -> tuple[Estimate, bool]:
        """Request the verdicts that are not in the journal.

        groups: returns the answers to each prompt. Returns the state of the journal afterwards, and
        whether the budget stopped the rest.
        """
        _, sent = send_missing(self.teacher, lambda: self.requests(groups()), journal)
        estimate = estimate_requests(self.requests(groups()), journal, self.teacher.price)
        return estimate, sent.out_of_budget

    def chooser(self, journal: Journal) -> Chooser:
        """Keep the answer with the highest score according to the journal's verdicts.

        Ties go to the first. An answer without a verdict is never kept.
        """

        def choose(rows: Sequence[Row]) -> list[str | None]:
            if len(rows) < 2:
                return [None for _ in rows]
            of = self._scores if self.section.compare == "scores" else self._wins
            fewer = "the judge gives it {:g}, and the best {:g}"
            return keep_best(of(rows, journal), "the judge gave no verdict", fewer)

        return choose

    def _scores(self, rows: Sequence[Row], journal: Journal) -> list[float | None]:
        return [read_score(self._reply(self._score(row), journal)) for row in rows]

    def _wins(self, rows: Sequence[Row], journal: Journal) -> list[float | None]:
        """Give each answer half a point for each comparison that it wins.

        A pair without both verdicts is skipped, because a single one may reflect only a preference
        for the first position.
        """
        points: list[float | None] = [None for _ in rows]
        for one, other in itertools.combinations(range(len(rows)), 2):
            orders = ((one, other), (other, one))
            replies = [self._reply(self._pair(rows[a], rows[b]), journal) for a, b in orders]
            verdicts = [read_verdict(reply) for reply in replies]
            if None in verdicts:
                continue
            for (first, second), verdict in zip(orders, verdicts, strict=True):
                for number, won in ((first, verdict == "A"), (second, verdict == "B")):
                    points[number] = (points[number] or 0.0) + 0.5 * won
        return points

    def _reply(self, request: Request, journal: Journal) -> str:
        """The judge's reply to a request; empty if there is none."""
        answer = journal.get(request.key)
        return "" if answer is None else answer_text(answer)

    def _score(self, row: Row) -> Request:
        return self._request(_SCORE.format(**self._shown(row), answer=answer_only(row)))

    def _pair(self, first: Row, second: Row) -> Request:
        answers = {"first": answer_only(first), "second": answer_only(second)}
        return self._request(_PAIR.format(**self._shown(first), **answers))

    def _shown(self, row: Row) -> dict[str, str]:
        return {"question": text_of(row.messages, _ROLES), "criteria": self.section.criteria}

    def _request(self, text: str) -> Request:
        return self.teacher.request(user_turn(text))


def open_judge(choice: Choice | None, default: DefaultModel, seed: int) -> Judge | None:
    """Open the recipe's judge, if any. Raises ModelError."""
    if not isinstance(choice, JudgeChoice):
        return None
    source = text_source(choice.teacher, choice.sampling, choice.budget, default, seed)
    return Judge(choice, source)


def most_requests(choice: Choice | None, answers: int, samples: int) -> int:
    """Upper bound on requests to the judge about `answers` answers, `samples` per prompt."""
    if not isinstance(choice, JudgeChoice):
        return 0
    return answers * (samples - 1 if choice.compare == "pairs" else 1)

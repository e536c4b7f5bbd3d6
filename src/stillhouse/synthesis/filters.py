"""Filters the teacher's answers. Dropped rows are counted by filter and saved to a file.

A filter is a function that returns the reason to drop a row, or None. Filters run in a fixed order,
the cheapest first; the first one that returns a reason drops the row.
"""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jsonschema.exceptions import best_match
from referencing.exceptions import Unresolvable

from stillhouse.data.clear_json import parse_json
from stillhouse.data.reasoning import MARKS
from stillhouse.data.words import bare, words
from stillhouse.errors import RecipeError
from stillhouse.generation.chat_frame import content_text, text_of
from stillhouse.generation.request import Message
from stillhouse.synthesis.answer_schema import read_schema as read_schema
from stillhouse.synthesis.answer_schema import schema_validator, unresolved
from stillhouse.synthesis.near_duplicates import NearDuplicates
from stillhouse.synthesis.patterns import compiled_pattern
from stillhouse.synthesis.prompts import Prompt
from stillhouse.synthesis.refusals import refusing_words

_FENCE = re.compile(r"```(?:json)?[ \t]*\n(.*?)\n?[ \t]*```", re.DOTALL | re.IGNORECASE)


@dataclass(frozen=True)
class Row:
    """One answered prompt.

    messages: the messages before the answer in the training text. text: the answer. likelihood:
    mean log-probability of the answer's tokens, if the teacher returned it. key: the request's key.
    """

    messages: tuple[Message, ...]
    text: str
    finish_reason: str | None
    where: str
    sample: int = 0
    likelihood: float | None = None
    key: str = ""


Filter = Callable[[Row], str | None]
Chooser = Callable[[Sequence[Row]], Sequence[str | None]]
"""Called with all answers to one prompt; returns the reason to drop each, or None."""


def empty(row: Row) -> str | None:
    return None if row.text.strip() else "the answer is empty"


def truncated(row: Row) -> str | None:
    return "cut off at the token limit" if row.finish_reason == "length" else None


def refusal(row: Row) -> str | None:
    """Drop refusals, recognized by the answer and the prompt, or reported by the server."""
    if row.finish_reason in ("refusal", "content_filter"):
        return f"the server reports {row.finish_reason}"
    asked = [content_text(m.get("content")) for m in row.messages if m["role"] == "user"]
    phrase = refusing_words(answer_only(row), asked[-1] if asked else "")
    return None if phrase is None else f"it is a refusal: {phrase!r}"


LEAST_SURE = 0.5
"""Probability of a language above which an answer counts as written in it."""


def languages(allowed: Sequence[str], where: str) -> Filter:
    """Keep answers in one of the languages, and answers of uncertain language (numbers, names,
    code). Reasoning is ignored.

    where: the recipe's key. Raises RecipeError for an unknown code, or if py3langid is not
    installed.
    """
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError:
        raise RecipeError(
            "the filter `languages` needs py3langid",
            where=where,
            fix="pip install 'stillhouse[language]'",
        ) from None
    identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    unknown = sorted(set(allowed) - set(identifier.labels))
    if unknown:
        raise RecipeError(
            f"py3langid does not detect the language {', '.join(unknown)}",
            where=where,
            fix="use ISO 639-1 codes, e.g. en, de, fr, es, zh, ja",
        )

    def judge(row: Row) -> str | None:
        found, probability = identifier.classify(answer_only(row))
        if found in allowed or probability < LEAST_SURE:
            return None
        return f"it is in the language {found} ({probability:.0%} sure)"

    return judge


def length(least: int | None, most: int | None) -> Filter:
    """Keep answers of `least` to `most` characters, not counting reasoning."""

    def judge(row: Row) -> str | None:
        size = len(answer_only(row))
        if least is not None and size < least:
            return f"{size} characters are fewer than {least}"
        if most is not None and size > most:
            return f"{size} characters are more than {most}"
        return None

    return judge


def pattern(expression: str, where: str, *, must_match: bool = True) -> Filter:
    """Keep answers that match the expression, or (must_match False) those that do not.

    Reasoning is ignored. where: the recipe's key. Raises RecipeError for an invalid regular
    expression.
    """
    compiled = compiled_pattern(expression, where)

    def judge(row: Row) -> str | None:
        found = compiled.search(answer_only(row))
        if must_match:
            return None if found else f"nothing in it matches {expression!r}"
        return f"it matches {expression!r}: {found.group()!r}" if found else None

    return judge


def json_schema(schema: dict[str, Any], where: object = "json_schema") -> Filter:
    """Keep answers that are JSON and match the schema, including `format`.

    Reasoning, and a code fence around the answer, are ignored. where: the schema's file. Raises
    RecipeError for a schema that is invalid or refers to anything outside it.
    """
    validator = schema_validator(schema, where)

    def judge(row: Row) -> str | None:
        try:
            value = json_value(answer_only(row))
            problem = best_match(validator.iter_errors(value))
        except Unresolvable as error:
            raise unresolved(error, where) from None
        except RecipeError as error:  # a pattern takes too long
            raise RecipeError(error.what, where=where, fix=error.fix) from None
        except (ValueError, RecursionError) as error:
            return f"not JSON: {error}"
        return None if problem is None else f"{problem.json_path}: {problem.message[:200]}"

    return judge


def unfenced(text: str) -> str:
    """Strip a Markdown code fence (``` or ```json) around the complete text."""
    found = _FENCE.fullmatch(text.strip())
    return text if found is None or "```" in found[1] else found[1].strip()


def json_value(text: str) -> Any:
    """Parse JSON, which may be in a code fence.

    Raises ValueError or RecursionError, also for NaN and Infinity, which are not JSON, and for
    duplicate keys in an object.
    """

    def reject(name: str) -> None:
        raise ValueError(f"{name} is not a JSON value")

    return parse_json(unfenced(text), parse_constant=reject)


def exact_duplicates() -> Filter:
    """Drop rows whose prompt and answer equal an earlier row's, ignoring case, spacing, and the
    punctuation around them."""
    seen: set[int] = set()

    def judge(row: Row) -> str | None:
        # With 64 bits, two of a million different rows collide in one of 40,000 runs.
        both = hash((bare(text_of(row.messages)), bare(row.text)))
        if both in seen:
            return "an earlier row has the same prompt and answer"
        seen.add(both)
        return None

    return judge


def near_duplicates(threshold: float) -> Filter:
    """Drop rows whose prompt and answer are similar to an earlier row's."""
    seen = NearDuplicates(threshold)

    def judge(row: Row) -> str | None:
        similar = seen.add(words(text_of(row.messages) + "\n" + row.text))
        return None if similar is None else f"{similar:.0%} similar to an earlier row"

    return judge


SHORTEST_GRAM = 5
"""Minimum words of an evaluation text to search for. Shorter texts would match unrelated rows, so
they are compared only with complete prompts."""


def decontaminate(evaluation: Iterable[Prompt], ngram: int) -> Filter:
    """Drop rows whose prompt or answer contains `ngram` consecutive words of an evaluation prompt.

    A shorter evaluation prompt must be contained completely, and one of fewer than SHORTEST_GRAM
    words must be the row's complete prompt.
    """
    grams: dict[int, set[str]] = {}
    short_prompts: set[str] = set()
    for item in evaluation:
        found = words(text_of(item.messages))
        if len(found) < SHORTEST_GRAM:
            short_prompts.add(" ".join(found))
        else:
            size = min(ngram, len(found))
            grams.setdefault(size, set()).update(_grams(found, size))

    def judge(row: Row) -> str | None:
        prompt = words(text_of(row.messages))
        if " ".join(prompt) in short_prompts:
            return "the prompt is in the evaluation set"
        for part in (prompt, words(row.text)):
            for size, known in grams.items():
                shared = next((gram for gram in _grams(part, size) if gram in known), None)
                if shared is not None:
                    return f"shared with the evaluation set: {shared!r}"
        return None

    return judge


def _grams(found: list[str], size: int) -> Iterable[str]:
    return (" ".join(found[at : at + size]) for at in range(len(found) - size + 1))


def answer_only(row: Row) -> str:
    """The row's answer without reasoning."""
    return MARKS.split(row.text, cut_off=row.finish_reason == "length").answer.strip()


# --- all filters ------------------------------------------------------------------------------

DROPPED = "dropped.jsonl"
BEST_OF = "best_of"
"""The chooser's name among the filters."""


@dataclass(frozen=True)
class Filters:
    """Filters by name, in order.

    before: filters that see one answer at a time. chooser: sees all remaining answers to a prompt.
    after: filters that compare with earlier rows.
    """

    before: dict[str, Filter]
    chooser: Chooser | None = None
    after: dict[str, Filter] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        return [*self.before, *([BEST_OF] if self.chooser else []), *self.after]

    def groups(self, rows: Iterable[Row]) -> Iterator[list[Row]]:
        """Yield the answers that pass `before`, grouped by prompt."""
        left = (row for row in rows if _objection(self.before, row) is None)
        for _, group in itertools.groupby(left, key=lambda row: row.where):
            yield list(group)


@dataclass
class Sieve:
    """Applies filters in order.

    file: JSONL with every dropped row, its filter, and the reason. dropped: number of dropped rows
    by filter, including zeros. cut_off: number of dropped rows that reached the token limit.
    """

    filters: Filters
    file: Path
    dropped: Counter[str] = field(default_factory=Counter)
    cut_off: int = 0

    def keep(self, rows: Iterable[Row]) -> Iterable[Row]:
        """Yield the rows that no filter drops, in order. Overwrites `file`."""
        self.dropped, self.cut_off = Counter(dict.fromkeys(self.filters.names, 0)), 0
        with self.file.open("w", encoding="utf-8", errors="replace") as lines:
            for _, answers in itertools.groupby(rows, key=lambda row: row.where):
                for row, objection in self._judged(list(answers)):
                    if objection is None:
                        yield row
                    else:
                        self.dropped[objection[0]] += 1
                        self.cut_off += row.finish_reason == "length"
                        lines.write(_dropped_line(row, *objection))

    def way_out(self, limit: str, otherwise: str) -> str:
        """How to fix a run in which all rows were dropped: raise `limit`, the key of the token
        limit, if that is the cause."""
        if 2 * self.cut_off <= self.dropped.total():
            return otherwise
        return (
            f"raise {limit}, which cut off {self.cut_off:,} answers (reasoning can take thousands "
            f"of tokens); {otherwise}"
        )

    def _judged(self, answers: list[Row]) -> Iterator[tuple[Row, tuple[str, str] | None]]:
        """Yield all answers to one prompt, each with the filter that drops it and the reason."""
        found = [_objection(self.filters.before, row) for row in answers]
        if self.filters.chooser is not None:
            left = [number for number, objection in enumerate(found) if objection is None]
            chosen = self.filters.chooser([answers[number] for number in left])
            for number, reason in zip(left, chosen, strict=True):
                found[number] = None if reason is None else (BEST_OF, reason)
        for row, objection in zip(answers, found, strict=True):
            yield row, objection or _objection(self.filters.after, row)


def _objection(filters: dict[str, Filter], row: Row) -> tuple[str, str] | None:
    for name, judge in filters.items():
        reason = judge(row)
        if reason is not None:
            return name, reason
    return None


def _dropped_line(row: Row, name: str, reason: str) -> str:
    facts = {
        "filter": name,
        "reason": reason,
        "where": row.where,
        "sample": row.sample,
        "messages": [*row.messages, {"role": "assistant", "content": row.text}],
    }
    return json.dumps(facts, ensure_ascii=False) + "\n"

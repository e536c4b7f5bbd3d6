"""A look at a synthesis before it is paid: what is known, a few real calls, rows made of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from stillhouse.recipe.synthesize import SynthesizeRecipe
from stillhouse.synthesis.asking import Asked, Origins, journal_path, text_teacher
from stillhouse.synthesis.estimate import Known, known_before
from stillhouse.synthesis.filters import Row
from stillhouse.synthesis.journal import Journal
from stillhouse.synthesis.run import Rows


def foreseen(section: SynthesizeRecipe, origins: Origins, *, seed: int = 0) -> Known:
    """What `synthesize` would find and ask; nothing is asked and nothing written."""
    teacher = text_teacher(section, origins, seed, weights=False)
    asked = Asked(section.prompts, origins.base, teacher.request)
    with _opened(section, origins) as journal:
        return known_before(asked.requests(), journal, teacher.price)


def ask_some(section: SynthesizeRecipe, origins: Origins, calls: int, *, seed: int = 0) -> int:
    """Asks so many of the missing requests, spread evenly over them; returns how many there were.

    Their answers are in the journal, so that nothing is asked twice. Raises as `synthesize`.
    """
    teacher = text_teacher(section, origins, seed)
    asked = Asked(section.prompts, origins.base, teacher.request)
    with Journal(journal_path(section, origins)) as journal:
        requests = enumerate(asked.requests())
        missing = [number for number, request in requests if journal.get(request.key) is None]
        count = min(calls, len(missing))
        if count:
            chosen = frozenset(missing[len(missing) * n // count] for n in range(count))
            whole = known_before(asked.requests(), journal, teacher.price)
            known = replace(whole, requests=count, missing=count)
            teacher.answer(replace(asked, only=chosen), journal, known)
    return count


def answered_rows(
    section: SynthesizeRecipe, origins: Origins, most: int, *, seed: int = 0
) -> list[Row]:
    """Up to `most` of the rows that the journal's answers make, before any filter."""
    teacher = text_teacher(section, origins, seed, weights=False)
    asked = Asked(section.prompts, origins.base, teacher.request)
    with _opened(section, origins) as journal:
        if journal is None:
            return []
        rows = iter(Rows(section, asked, journal))
        return [row for row, _ in zip(rows, range(most), strict=False)]


@contextmanager
def _opened(section: SynthesizeRecipe, origins: Origins) -> Iterator[Journal | None]:
    """The journal; None where there is none yet."""
    path = journal_path(section, origins)
    if not path.exists():
        yield None
        return
    with Journal(path) as journal:
        yield journal

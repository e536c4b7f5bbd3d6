"""A look at a synthesis before it is paid: what is known, a few real calls, rows made of them."""

from __future__ import annotations

import fcntl
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from stillhouse.finding import Finding
from stillhouse.generation.budget import Spending, worst_case
from stillhouse.generation.journal import Journal
from stillhouse.synthesis.estimate import Known, known_before
from stillhouse.synthesis.filters import Row
from stillhouse.synthesis.prompts import Prompt
from stillhouse.synthesis.synthesize import Rows
from stillhouse.synthesis.synthesize_config import SynthesizeRecipe
from stillhouse.synthesis.text_teacher import Asked, Origins, TextSource, journal_path, text_teacher
from stillhouse.synthesis.write_prompts import Part, Writer, open_writer, prompt_source


def foreseen(section: SynthesizeRecipe, origins: Origins, *, seed: int = 0) -> Known:
    """What `synthesize` would find and ask; nothing is asked and nothing written.

    Prompts that are still to be written count as long as they can be.
    """
    with _opened(section, origins) as journal:
        view = _look(section, origins, seed, journal, weights=False)
        known = known_before(view.asked.requests(), journal, view.teacher.price)
        return known if view.writer is None else _with_unwritten(known, view, section, journal)


def ask_some(section: SynthesizeRecipe, origins: Origins, calls: int, *, seed: int = 0) -> int:
    """Asks so many of the missing requests, spread evenly over them; returns how many there were:
    none where another process is asking.

    Where prompts are still to be written, one request for some is made first. All answers are in
    the journal, so that nothing is asked twice. Raises as `synthesize`.
    """
    path = journal_path(section, origins)
    if calls == 0 or being_written(path):
        return 0
    with Journal(path) as journal:
        view = _look(section, origins, seed, journal)
        writing = _spent_on_writing(view, journal)
        if view.writer is not None and next(view.writer.prompts(journal), None) is None:
            part = Part(view.writer, 0, 1)
            known = known_before(part.requests(), journal, view.teacher.price)
            view.writer.teacher.answer(part, journal, replace(known, spent=writing))
            writing = _spent_on_writing(view, journal)
        requests = enumerate(view.asked.requests())
        missing = [number for number, request in requests if journal.get(request.key) is None]
        count = min(calls, len(missing))
        if count:
            chosen = frozenset(missing[len(missing) * n // count] for n in range(count))
            whole = known_before(view.asked.requests(), journal, view.teacher.price)
            known = replace(whole, requests=count, missing=count, spent=whole.spent + writing)
            view.teacher.answer(replace(view.asked, only=chosen), journal, known)
    return count


def answered_rows(
    section: SynthesizeRecipe, origins: Origins, most: int, *, seed: int = 0
) -> list[Row]:
    """Up to `most` of the rows that the journal's answers make, before any filter."""
    with _opened(section, origins) as journal:
        if journal is None:
            return []
        view = _look(section, origins, seed, journal, weights=False)
        return list(itertools.islice(Rows(section, view.asked, journal), most))


@dataclass(frozen=True)
class _View:
    teacher: TextSource
    writer: Writer | None
    asked: Asked


def _look(
    section: SynthesizeRecipe,
    origins: Origins,
    seed: int,
    journal: Journal | None,
    *,
    weights: bool = True,
) -> _View:
    teacher = text_teacher(section, origins, seed, weights=weights)
    writer = open_writer(section, origins, seed, weights=weights)
    prompts = prompt_source(section.prompts, origins.base, seed, writer, journal)
    asked = Asked(section.prompts, origins.base, teacher.request, prompts=prompts)
    return _View(teacher, writer, asked)


def _spent_on_writing(view: _View, journal: Journal) -> Spending:
    """By the requests that wrote the prompts, which are under the same budget."""
    if view.writer is None:
        return Spending()
    return known_before(view.writer.requests(), journal, view.teacher.price).spent


def _with_unwritten(
    known: Known, view: _View, section: SynthesizeRecipe, journal: Journal | None
) -> Known:
    """With the answers to prompts that are not written yet, and the requests that write them."""
    writer, samples = view.writer, section.prompts.samples
    assert writer is not None
    wanted = min(writer.section.count, section.prompts.limit or writer.section.count)
    lacking = wanted - known.requests // samples
    if lacking <= 0:
        return known
    writing = known_before(writer.requests(), journal, view.teacher.price)
    # A prompt has at most as many tokens as the answer that it is a line of.
    longest = Prompt(({"role": "user", "content": "x" * writer.section.max_tokens},), "")
    one = worst_case(view.teacher.request(view.asked.frame.asked(longest), 0), view.teacher.price)
    more = lacking * samples
    return replace(
        known,
        requests=known.requests + more,
        missing=known.missing + more,
        worst=known.worst + writing.worst + Spending(one.tokens * more, one.usd * more),
    )


def told(known: Known, section: SynthesizeRecipe, things: str = "requests") -> str:
    """One line: what is answered, and what the rest costs. things: what requests are called."""
    api = section.teacher.api
    priced = api is not None and api.price is not None

    def amount(spending: Spending) -> str:
        cost = f"${spending.usd:,.2f}" if priced else "a price unknown"
        return f"{spending.tokens:,} tokens" + (f", {cost}" if api is not None else "")

    text = f"{known.answered:,} of {known.requests:,} {things} are answered"
    if known.missing == 0:
        return text
    about = ""
    if known.likely is not None:
        about = f"about {amount(known.likely)}; "
    if known.between is not None:
        low, high = known.between
        span = f"${low.usd:,.2f} to ${high.usd:,.2f}" if priced else ""
        span = span or f"{low.tokens:,} to {high.tokens:,} tokens"
        about = f"{about.removesuffix('; ')} (95 % likely: {span}); "
    return f"{text}; the rest takes {about}at most {amount(known.worst)}"


def findings(
    known: Known, section: SynthesizeRecipe, origins: Origins, topic: str, things: str = "requests"
) -> Iterator[Finding]:
    """The lines of `check` about what is answered, and what the rest costs."""
    fix = None
    if known.missing and known.between is None:
        fix = "--calls 5 makes a few calls, which count, and tells the cost of the rest from them"
    yield Finding("estimate" if known.missing else "ok", topic, told(known, section, things), fix)
    if being_written(journal_path(section, origins)):
        text = "a run is asking now: what the journal holds is not counted, and no call is made"
        yield Finding("warning", topic, text, "give the command again when the run has ended")


def being_written(journal: Path) -> bool:
    """Whether a process has it open, which keeps others from reading what is in it."""
    lock = journal.with_name(f"{journal.name}.lock")
    if not lock.exists():
        return False
    with lock.open(encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


@contextmanager
def _opened(section: SynthesizeRecipe, origins: Origins) -> Iterator[Journal | None]:
    """The journal; None where there is none yet, or another process has it."""
    path = journal_path(section, origins)
    if not path.exists() or being_written(path):
        yield None
        return
    with Journal(path) as journal:
        yield journal

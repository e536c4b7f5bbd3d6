"""Estimates the cost of a synthesis from the journal, and from a few requests that are sent
first."""

from __future__ import annotations

import itertools
from dataclasses import replace

from stillhouse.generation.answer_requests import being_written, opened_journal, send_some
from stillhouse.generation.budget import Spending, worst_case
from stillhouse.generation.chat_frame import user_turn
from stillhouse.generation.estimate import Estimate, estimate_requests
from stillhouse.generation.journal import Journal
from stillhouse.synthesis.filters import Row
from stillhouse.synthesis.synthesis_job import SynthesisJob, SynthesisRequests
from stillhouse.synthesis.synthesize import Rows
from stillhouse.synthesis.write_prompts import send_part


def estimate_synthesis(job: SynthesisJob, calls: int = 0) -> Estimate:
    """What the journal has of the requests of `synthesize`, and what the rest costs.

    calls: the number of missing requests to send first. Prompts that are not written yet count with
    their greatest length. Raises as `synthesize`.
    """
    if calls and not being_written(job.journal):
        with Journal(job.journal) as journal:
            _send_some(SynthesisRequests(job, journal), journal, calls)
    with opened_journal(job.journal) as found:
        requests = SynthesisRequests(job, found, weights=False)
        estimate = estimate_requests(requests(), found, requests.teacher.price)
        return estimate if requests.writer is None else _with_unwritten(estimate, requests)


def answered_rows(job: SynthesisJob, most: int) -> list[Row]:
    """Up to `most` rows from the answers in the journal, before any filter."""
    with opened_journal(job.journal) as journal:
        if journal is None:
            return []
        requests = SynthesisRequests(job, journal, weights=False)
        return list(itertools.islice(Rows(requests, journal), most))


def _send_some(requests: SynthesisRequests, journal: Journal, calls: int) -> None:
    """If no prompts are written yet, first sends a request for some."""
    writer = requests.writer
    if writer is not None and next(writer.prompts(journal), None) is None:
        send_part(writer, 0, 1, journal, Spending())
    send_some(requests.teacher, requests, journal, calls, requests.spent_on_writing())


def _with_unwritten(estimate: Estimate, requests: SynthesisRequests) -> Estimate:
    """Adds the answers to prompts that are not written yet, and the requests that write them."""
    section, writer, teacher = requests.job.section.prompts, requests.writer, requests.teacher
    assert writer is not None
    needed = min(writer.section.count, section.limit or writer.section.count)
    lacking = needed - estimate.requests // section.samples
    if lacking <= 0:
        return estimate
    writing = estimate_requests(writer.requests(), requests.journal, teacher.price)
    # A prompt has at most as many tokens as the answer that contains it.
    longest = requests.frame.teacher_sees(user_turn("x" * writer.section.max_tokens))
    one = worst_case(teacher.request(longest), teacher.price)
    more = lacking * section.samples
    return replace(
        estimate,
        requests=estimate.requests + more,
        missing=estimate.missing + more,
        worst=estimate.worst + writing.worst + Spending(one.tokens * more, one.usd * more),
    )

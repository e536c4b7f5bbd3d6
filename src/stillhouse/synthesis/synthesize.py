"""Runs the section `synthesize`: has prompts answered, filters the answers, and writes chats."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from stillhouse.atomic_files import write_atomically
from stillhouse.errors import DataError, RunError, StillhouseError
from stillhouse.generation.answer_logprobs import mean_log_probability
from stillhouse.generation.answer_requests import (
    being_written,
    opened_journal,
    send_missing,
    send_some,
)
from stillhouse.generation.budget import Spending, worst_case
from stillhouse.generation.chat_frame import answer_text, user_turn
from stillhouse.generation.estimate import Estimate, estimate_requests
from stillhouse.generation.journal import Journal
from stillhouse.progress import note
from stillhouse.synthesis import filters
from stillhouse.synthesis.filters import DROPPED, Chooser, Filter, Filters, Row, Sieve
from stillhouse.synthesis.judge_answers import likelihood, majority
from stillhouse.synthesis.prompts import read_prompts
from stillhouse.synthesis.synthesis_job import SynthesisJob, SynthesisRequests
from stillhouse.synthesis.synthesize_config import FiltersRecipe, LikelihoodChoice, MajorityChoice
from stillhouse.synthesis.write_prompts import send_part, write_prompts

TEXT, SUMMARY = "synthetic.jsonl", "summary.json"
REQUESTS = "requests.txt"
"""The journal key of each row of TEXT, one per line."""
FILTERS = "synthesize.filters"
BUDGET, JUDGE_BUDGET = "synthesize.budget", f"{FILTERS}.best_of.budget"

_PATHS = ("out", "dropped_rows", "journal")


@dataclass(frozen=True)
class Synthesis:
    """The result of a synthesis.

    requests: number of prompts times samples. answered: requests with an answer in the journal.
    new, failed: requests answered in this run, and requests that failed in it. kept: rows in `out`.
    dropped: dropped rows by filter. tokens, usd: the cost of all answers, in any run, and of the
    requests that wrote the prompts. unpriced: answers of unknown cost, which `usd` does not
    include. lost_tokens, lost_usd: the most that may also have been billed for answers that did not
    arrive. judged, unjudged: a judge's verdicts, and missing ones. judge_tokens, judge_usd: their
    cost; judge_usd is None if the price is unknown.
    """

    out: Path
    dropped_rows: Path
    journal: Path
    requests: int
    answered: int
    new: int
    failed: int
    kept: int
    tokens: int
    usd: float
    unpriced: int
    out_of_budget: bool
    judged: int = 0
    unjudged: int = 0
    judge_tokens: int = 0
    judge_usd: float | None = 0.0
    lost_tokens: int = 0
    lost_usd: float = 0.0
    dropped: dict[str, int] = field(default_factory=dict)

    @property
    def cost(self) -> str:
        if self.unpriced == 0:
            return f"${self.usd:,.4f}"
        return "unknown" + (f" (${self.usd:,.4f} of it known)" if self.usd else "")

    def facts(self) -> dict[str, Any]:
        """All fields except the paths."""
        return {name: value for name, value in asdict(self).items() if name not in _PATHS}

    def lines(self) -> list[tuple[str, str]]:
        """Names and values for the terminal."""
        missing = self.requests - self.answered
        rest = f", {missing:,} have none" if missing else ""
        rest += f" ({self.failed:,} failed now)" if self.failed else ""
        dropped = ", ".join(f"{name} {count:,}" for name, count in self.dropped.items() if count)
        lines = [
            ("answers", f"{self.answered:,} of {self.requests:,}, {self.new:,} of them new{rest}"),
            ("dropped", f"{dropped or 'none'}  {self.dropped_rows if dropped else ''}".rstrip()),
            ("tokens", f"{self.tokens:,}"),
            ("cost", self.cost),
        ]
        if self.lost_tokens:
            most = f"${self.lost_usd:,.4f}, " if self.lost_usd else ""
            lost = f"at most {most}{self.lost_tokens:,} tokens, billed but not received"
            lines.append(("lost", lost))
        if self.judged + self.unjudged:
            verdicts = f"{self.judged:,} verdicts"
            verdicts += f" ({self.unjudged:,} missing)" if self.unjudged else ""
            cost = "cost unknown" if self.judge_usd is None else f"${self.judge_usd:,.4f}"
            lines.append(("judge", f"{verdicts}, {self.judge_tokens:,} tokens, {cost}"))
        return [*lines, ("journal", str(self.journal)), ("rows", f"{self.kept:,}  {self.out}")]


def synthesize(job: SynthesisJob, folder: Path) -> Synthesis:
    """Send the requests without an answer in the journal, and write the rows that pass the filters.

    Writes TEXT to the folder, with rows {"messages": [...]} in the order of the prompts, each
    ending with the answer; also REQUESTS, DROPPED, and SUMMARY. If the budget is used up, no more
    requests are sent, but the rest continues. Raises DataError for invalid prompts, or if no row is
    left; EndpointError; ModelError; and RunError for the journal, the disk, or a budget that
    suffices for no row.
    """
    # An invalid filter must be found before anything is paid for.
    chosen, judge = chosen_filters(job.section.filters, job.base, FILTERS), job.judge()
    folder.mkdir(parents=True, exist_ok=True)
    judged: dict[str, Any] = {}
    used_up: list[str] = []  # keys of budgets
    with Journal(job.journal) as journal:
        requests = SynthesisRequests(job, journal)
        teacher, writing, spent = requests.teacher, Spending(), None
        if requests.writer is not None:
            answers = estimate_requests(requests(), journal, teacher.price).spent
            writing = write_prompts(requests.writer, journal, answers)
            spent = estimate_requests(requests(), journal, teacher.price).spent + writing
        estimate, sent = send_missing(teacher, requests, journal, spent)
        if sent.out_of_budget:
            used_up.append(BUDGET)
        if judge is not None:
            verdicts, stopped = judge.judge(lambda: chosen.groups(Rows(requests, journal)), journal)
            judged = {
                "judged": verdicts.answered,
                "unjudged": verdicts.missing,
                "judge_tokens": verdicts.spent.tokens,
                "judge_usd": None if judge.teacher.price is None else verdicts.spent.usd,
            }
            if stopped:
                used_up.append(JUDGE_BUDGET)
            chosen = replace(chosen, chooser=judge.chooser(journal))
        rows = Rows(requests, journal)
        sieve = Sieve(chosen, folder / DROPPED)
        kept = _write(folder, sieve.keep(rows))
    result = Synthesis(
        out=folder / TEXT,
        dropped_rows=sieve.file,
        journal=job.journal,
        requests=estimate.requests,
        answered=rows.answered,
        new=sent.answered,
        failed=sent.failed,
        kept=kept,
        tokens=rows.tokens + writing.tokens,
        usd=rows.usd + writing.usd,
        unpriced=rows.unpriced,
        lost_tokens=rows.lost.tokens,
        lost_usd=rows.lost.usd,
        out_of_budget=bool(used_up),
        dropped=dict(sieve.dropped),
        **judged,
    )
    facts = json.dumps({**result.facts(), "cost": result.cost}, indent=2)
    write_atomically(folder / SUMMARY, facts)
    if kept == 0:
        raise _no_rows(result, sieve, used_up)
    if used_up:
        note(f"the budget is used up: raise {' and '.join(used_up)} to continue")
    return result


def _no_rows(result: Synthesis, sieve: Sieve, used_up: Sequence[str]) -> StillhouseError:
    """The error if no row is left. used_up: keys of the budgets that are used up."""
    unanswered = BUDGET in used_up and not result.answered
    if unanswered or (JUDGE_BUDGET in used_up and result.unjudged):
        what = "no request is answered" if unanswered else "no answer has a verdict"
        return RunError(
            f"no row is left: {what}, because the budget is used up",
            where=result.journal,
            fix=f"raise {' and '.join(used_up)}; no request is paid for twice",
        )
    return DataError(
        f"no row is left: the filters dropped all {result.answered} answers",
        where=result.dropped_rows,
        fix=sieve.way_out(
            "synthesize.sampling.max_tokens",
            f"see which rows were dropped and why, then loosen {FILTERS}",
        ),
    )


# --- rows ------------------------------------------------------------------------------------


class Rows:
    """Iterates over the answered prompts as rows, in order, and counts them and their cost."""

    def __init__(self, requests: SynthesisRequests, journal: Journal) -> None:
        self.requests, self.journal = requests, journal
        self.answered = self.tokens = self.unpriced = 0
        self.usd = 0.0
        self.lost = Spending()

    def __iter__(self) -> Iterator[Row]:
        section = self.requests.job.section
        keep = section.reasoning == "keep"
        ranked = isinstance(section.filters.best_of, LikelihoodChoice)
        seen: set[bytes] = set()
        for prompt, request in self.requests.pairs():
            answer = self.journal.get(request.key, logprobs=ranked)
            digest = bytes.fromhex(request.key)[:16]
            first = digest not in seen  # a repeated prompt was paid for once
            if first:
                seen.add(digest)
                self.lost += self.journal.billed_failures(request.key)
            if answer is None:
                continue
            self.answered += 1
            if first:
                self.tokens += (answer.prompt_tokens or 0) + (answer.completion_tokens or 0)
                self.usd += answer.cost or 0.0
                self.unpriced += answer.cost is None
            yield Row(
                self.requests.frame.student_sees(prompt.messages),
                answer_text(answer, keep_reasoning=keep),
                answer.finish_reason,
                prompt.where,
                request.sample,
                mean_log_probability(answer),
                request.key,
            )


def _write(folder: Path, rows: Iterable[Row]) -> int:
    kept = 0
    with (
        (folder / TEXT).open("w", encoding="utf-8", errors="replace") as text,
        (folder / REQUESTS).open("w", encoding="utf-8") as keys,
    ):
        for row in rows:
            messages = [*row.messages, {"role": "assistant", "content": row.text}]
            text.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
            keys.write(f"{row.key}\n")
            kept += 1
    return kept


def chosen_filters(section: FiltersRecipe, base: Path, key: str) -> Filters:
    """The recipe's filters by name, the cheapest first; a judge is added later.

    key: the section's key in the recipe. Raises RecipeError, DataError.
    """
    chosen: dict[str, Filter] = {"empty": filters.empty}
    if section.truncated:
        chosen["truncated"] = filters.truncated
    if section.refusals:
        chosen["refusals"] = filters.refusal
    if section.min_characters is not None or section.max_characters is not None:
        chosen["length"] = filters.length(section.min_characters, section.max_characters)
    if (required := section.require_pattern) is not None:
        chosen["require_pattern"] = filters.pattern(required, f"{key}.require_pattern")
    if (forbidden := section.forbid_pattern) is not None:
        where = f"{key}.forbid_pattern"
        chosen["forbid_pattern"] = filters.pattern(forbidden, where, must_match=False)
    if section.json_schema is not None:
        file = base / section.json_schema
        chosen["json_schema"] = filters.json_schema(filters.read_schema(file), file)
    if section.languages is not None:
        chosen["languages"] = filters.languages(section.languages, f"{key}.languages")
    if section.decontaminate is not None:
        texts, setting = section.decontaminate, f"{key}.decontaminate.key"
        items = read_prompts(
            base / texts.path, format=texts.format, key=texts.key, setting=setting, learned=False
        )
        chosen["decontaminate"] = filters.decontaminate(items, texts.ngram)
    remembering: dict[str, Filter] = {}
    if section.exact_duplicates:
        remembering["exact_duplicates"] = filters.exact_duplicates()
    if section.near_duplicates is not None:
        remembering["near_duplicates"] = filters.near_duplicates(section.near_duplicates)
    return Filters(chosen, _chooser(section, key), remembering)


def _chooser(section: FiltersRecipe, key: str) -> Chooser | None:
    match section.best_of:
        case MajorityChoice() as choice:
            where, keep_all = f"{key}.best_of.pattern", choice.keep == "all"
            return majority(choice.pattern, where, least=choice.min_agreement, keep_all=keep_all)
        case LikelihoodChoice():
            return likelihood()
    return None


# --- before anything is spent -------------------------------------------------------------------


def estimate_synthesis(job: SynthesisJob, calls: int = 0) -> Estimate:
    """Count the requests of `synthesize` that are answered, and estimate the cost of the others.

    calls: the number of missing requests to send first. Prompts that are not written yet count with
    their maximum length. Raises the errors of `synthesize`.
    """
    if calls and not being_written(job.journal):
        with Journal(job.journal) as journal:
            _send_some(SynthesisRequests(job, journal), journal, calls)
    with opened_journal(job.journal) as found:
        requests = SynthesisRequests(job, found)
        estimate = estimate_requests(requests(), found, requests.teacher.price)
        return estimate if requests.writer is None else _with_unwritten(estimate, requests)


def answered_rows(job: SynthesisJob, most: int) -> list[Row]:
    """Up to `most` rows from the answers in the journal, unfiltered."""
    with opened_journal(job.journal) as journal:
        if journal is None:
            return []
        requests = SynthesisRequests(job, journal)
        return list(itertools.islice(Rows(requests, journal), most))


def _send_some(requests: SynthesisRequests, journal: Journal, calls: int) -> None:
    """Send some missing requests; if no prompts are written yet, first request some prompts."""
    writer = requests.writer
    if writer is not None and next(writer.prompts(), None) is None:
        send_part(writer, 0, 1, journal, Spending())
    writing = Spending() if writer is None else writer.spent
    send_some(requests.teacher, requests, journal, calls, writing)


def _with_unwritten(estimate: Estimate, requests: SynthesisRequests) -> Estimate:
    """Add the answers to prompts that are not written yet, and the requests to write them."""
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

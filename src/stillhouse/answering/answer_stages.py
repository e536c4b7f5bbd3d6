"""The first stages of a run: split the texts, and collect the teacher's answers in the journal."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from stillhouse.answering.answer_texts import TEXTS, AnswerTexts, prepare_answer_texts
from stillhouse.answering.answering_config import ExtractTask
from stillhouse.answering.answering_job import GOLD, HELDOUT, TRAIN, AnsweringJob
from stillhouse.errors import DataError, RunError
from stillhouse.generation.answer_logprobs import mean_log_probability
from stillhouse.generation.answer_requests import answer_all
from stillhouse.generation.chat_frame import answer_text, has_reasoning
from stillhouse.generation.helpers import help_main_process, helpers_of
from stillhouse.generation.journal import Journal
from stillhouse.generation.request import Answer
from stillhouse.generation.text_teacher import answers_of, any_runs_here
from stillhouse.pipeline.stage_plan import unanswered
from stillhouse.progress import note
from stillhouse.runfolder import Outcome, Stage, StagePlan
from stillhouse.shared_work import ALONE, all_processes
from stillhouse.synthesis.filters import DROPPED, Filters, Row, Sieve, unfenced
from stillhouse.synthesis.synthesize import chosen_filters
from stillhouse.tasks.task_facts import texts_key

ANSWERS = "answers.jsonl"


def plan_answer_texts(job: AnsweringJob) -> StagePlan:
    recipe, section = job.recipe, job.recipe.data

    def work(out: Path) -> Outcome:
        found = prepare_answer_texts(recipe, job.base, job.validity)
        found.save(out / TEXTS)
        sizes = {"train": len(found.train), "test": len(found.test), "repeated": found.repeated}
        return Outcome(summary=sizes)

    examples = [example.text for example in recipe.task.examples]
    inputs = {
        **texts_key(section, job.base, seed=recipe.seed, examples=examples, unread="context"),
        "schema": job.schema,
    }
    return StagePlan("texts", inputs, work, version=2)


# --- answers -------------------------------------------------------------------------------------


def plan_answers(job: AnsweringJob, texts: Stage) -> StagePlan:
    """Let the teacher answer every text; answers that pass the filters become training chats."""
    recipe, teacher = job.recipe, job.recipe.teacher
    judge = job.judge()
    runs_here = any_runs_here(job.source(), judge.teacher if judge else None)

    def work(out: Path) -> Outcome:
        processes = all_processes() if runs_here else ALONE
        if not processes.leads:
            help_main_process(processes, answers_of)
            return Outcome()
        found = AnswerTexts.load(texts.path / TEXTS)
        with helpers_of(processes) as helpers:
            counts = _write_answers(replace(job, helpers=helpers), found, out)
        return Outcome(summary=counts)

    models: dict[str, Any] = {"teacher": job.teacher and job.teacher.fingerprint}
    if teacher.api is not None:
        models = {"model": teacher.api.model, "endpoint": job.described}
    if teacher.vllm is not None:
        models["vllm"] = {"dtype": teacher.vllm.dtype, "options": teacher.vllm.options}
    if judge is not None:
        one = judge.teacher.request(())
        models["judge"] = [one.endpoint, one.model, dict(one.parameters)]
    inputs = {
        **models,
        "task": recipe.task.model_dump(mode="json", exclude={"kind", "json_schema"}),
        "schema": job.schema,
        "sampling": teacher.sampling.model_dump(mode="json"),
        "samples": teacher.samples,
        "precision": teacher.precision,
        "filters": recipe.filters.model_dump(mode="json", exclude={"best_of": {"teacher"}}),
        "seed": recipe.seed,
        "texts": texts.digest,
    }
    return StagePlan("answers", inputs, work, version=4, together=runs_here, missing=unanswered)


def _write_answers(job: AnsweringJob, found: AnswerTexts, out: Path) -> dict[str, Any]:
    # Errors in filters must be found before any request is paid for.
    filters = chosen_filters(job.recipe.filters, job.base, "filters")
    if job.validity is not None:
        filters.before["json_schema"] = job.validity
    source = job.source()
    answers = answer_all(source, job.requests(source, found), job.journal, "teacher.budget")
    got = answers.found
    _note_reasoning(job, got)
    samples = job.recipe.teacher.samples
    train = [
        Row(
            job.student_messages(text.text),
            _words(job, answer),
            answer.finish_reason,
            text.where,
            number % samples,
            mean_log_probability(answer),
        )
        for number, answer in enumerate(got[: samples * len(found.train)])
        if answer is not None
        for text in (found.train[number // samples],)
    ]
    kept, dropped = _keep(job, filters, train, out)
    of_test = got[samples * len(found.train) :]
    tested = [None if one is None else _words(job, one) for one in of_test]
    lines = "".join(json.dumps(text, ensure_ascii=False) + "\n" for text in tested)
    (out / ANSWERS).write_text(lines, encoding="utf-8")
    shown = [(row.text, text) for row, text in zip(found.test, tested, strict=True) if text]
    if not shown:
        raise DataError(
            "the teacher answered none of the test texts",
            where=job.journal,
            fix="check the failed requests in the journal",
        )
    _write_chats(out / HELDOUT, ((job.student_messages(text), answer) for text, answer in shown))
    gold = [
        (job.student_messages(row.text), row.gold) for row in found.train if row.gold is not None
    ]
    _write_chats(out / GOLD, gold)
    return {
        "answered": sum(answer is not None for answer in got),
        "asked": len(got),
        "unanswered": answers.unanswered,
        "kept": kept,
        "gold": len(gold),
        "dropped": {name: count for name, count in dropped.items() if count},
        **answers.cost(),
    }


def _note_reasoning(job: AnsweringJob, answers: Sequence[Answer | None]) -> None:
    """Note that the teacher reasons, but that its distributions without reasoning are learned."""
    reasoned = sum(answer is not None and has_reasoning(answer) for answer in answers)
    if reasoned and not job.recipe.learns_text_alone:
        note(
            f"the teacher reasons before {reasoned:,} of {len(answers):,} answers, but the student "
            "learns its distributions over the answers without reasoning. To learn only the text, "
            "set objective: {terms: [{divergence: cross_entropy}]}"
        )


def _keep(
    job: AnsweringJob, filters: Filters, rows: list[Row], out: Path
) -> tuple[int, Mapping[str, int]]:
    """Write the chats that pass the filters; return their number, and dropped rows by filter.

    Raises DataError if none is left, and RunError if a judge's budget is used up.
    """
    with _judged(job, filters, rows) as chosen:
        sieve = Sieve(chosen, out / DROPPED)
        kept = _write_chats(out / TRAIN, ((row.messages, row.text) for row in sieve.keep(rows)))
    if kept == 0:
        raise DataError(
            f"no answer is left: the filters dropped all {len(rows):,} answers",
            where=job.journal,
            fix=sieve.way_out(
                "teacher.sampling.max_tokens",
                "read the answers in the journal, then improve task.prompt or add examples "
                f"(dropped by filter: {dict(sieve.dropped)})",
            ),
        )
    return kept, sieve.dropped


@contextmanager
def _judged(job: AnsweringJob, filters: Filters, rows: list[Row]) -> Iterator[Filters]:
    """Add a judge's verdicts to the filters, if the recipe uses a judge."""
    judge = job.judge()
    if judge is None:
        yield filters
        return
    with Journal(job.journal) as journal:
        _, out_of_budget = judge.judge(lambda: filters.groups(rows), journal)
        if out_of_budget:
            raise RunError(
                "the judge's budget is used up",
                where=job.journal,
                fix="raise filters.best_of.budget; no verdict is paid for twice",
            )
        yield replace(filters, chooser=judge.chooser(journal))


def _words(job: AnsweringJob, answer: Answer) -> str:
    """The text that the student should generate: no reasoning, and JSON without a code fence."""
    text = answer_text(answer)
    return unfenced(text) if isinstance(job.recipe.task, ExtractTask) else text


def _write_chats(path: Path, chats: Iterable[tuple[Any, str]]) -> int:
    count = 0
    with path.open("w", encoding="utf-8", errors="replace") as file:
        for messages, answer in chats:
            turns = [*map(dict, messages), {"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": turns}, ensure_ascii=False) + "\n")
            count += 1
    return count


def read_answers(answered: Stage) -> list[str | None]:
    """Read the teacher's answers to the test texts; None for texts without an answer."""
    lines = (answered.path / ANSWERS).read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines if line]

"""Checks a recipe's synthesis and estimates its cost before any requests are sent."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from stillhouse.data.data_config import FileSource, HubSource, Source
from stillhouse.data.documents import Conversation
from stillhouse.data.row_formats import document_from_row
from stillhouse.data.sources import read_sources, size_estimate
from stillhouse.data.tokenize_rows import require_rows
from stillhouse.errors import RecipeError, RunError
from stillhouse.finding import Finding
from stillhouse.generation.answer_requests import findings
from stillhouse.generation.chat_frame import user_turn
from stillhouse.generation.generation_config import may_cost
from stillhouse.generation.source_check import (
    FrameKeys,
    rendered_training,
    require_source,
    require_template,
)
from stillhouse.language_model.job import Job
from stillhouse.language_model.recipe import Recipe
from stillhouse.language_model.synthesis_stage import (
    finished_text,
    input_files,
    makes_text,
    may_replace,
    missing_answers,
    out_path,
    synthesis_job,
)
from stillhouse.pipeline.kind import Check
from stillhouse.synthesis.judge_answers import most_requests
from stillhouse.synthesis.prompts import unread_notes
from stillhouse.synthesis.synthesize import (
    FILTERS,
    TEXT,
    answered_rows,
    chosen_filters,
    estimate_synthesis,
)
from stillhouse.synthesis.synthesize_config import JudgeChoice, SynthesizeRecipe
from stillhouse.synthesis.synthesized_text import names
from stillhouse.teachers.load_model import load_tokenizer


def require_text_teacher(recipe: Recipe, base: Path) -> Iterator[Finding]:
    """Check the teacher before any request: its key or packages, the filters, and whether its
    template accepts the prompts. Raises StillhouseError."""
    section = recipe.synthesize
    if section is None or _is_complete(recipe, base):
        return
    chosen_filters(section.filters, base, FILTERS)
    prompts = section.prompts
    if prompts.path is not None:
        path = base / prompts.path
        fix = "write all of it into `prompt`"
        if prompts.key != "prompt":
            fix = "remove synthesize.prompts.key to ask all of it"
        for note in unread_notes(path, format=prompts.format, key=prompts.key):
            yield Finding("warning", "prompts", note, fix)
    work = synthesis_job(recipe, base)
    if estimate_synthesis(work).missing:
        yield from require_source(
            work.teacher(),
            work.chats(),
            whose="the teacher",
            key="synthesize.teacher",
            keys=_keys(section),
        )
        judge = work.judge()
        if judge is not None:
            question = [(user_turn("Which is better?"), "the judge's question")]
            key = "synthesize.filters.best_of.teacher"
            yield from require_source(judge.teacher, question, whose="the judge", key=key)


def require_synthesis(job: Job) -> Iterator[Finding]:
    """Like `require_text_teacher`; also check the output path, and that the student's template
    accepts prompts with answers. Raises StillhouseError."""
    recipe, base = job.recipe, job.base
    section = recipe.synthesize
    if section is None or _is_complete(recipe, base):
        return
    _require_out(recipe, section, base)
    yield from require_text_teacher(recipe, base)
    if not makes_text(recipe, base):
        return
    _require_other_text(job, out_path(section, base))
    require_template(
        rendered_training(load_tokenizer(job.tokenizer), reasoning=section.reasoning == "keep"),
        synthesis_job(recipe, base).chats(student=True),
        whose="the student",
        where=job.tokenizer.path,
        keys=_keys(section),
        fix="set synthesize.reasoning: keep if the template opens the reasoning itself; "
        "otherwise, use messages that it accepts, or a model with a different template",
    )


def _keys(section: SynthesizeRecipe) -> FrameKeys:
    prompts = section.prompts
    return FrameKeys.of("synthesize.prompts", prompts.system, prompts.examples)


def _is_complete(recipe: Recipe, base: Path) -> bool:
    """Whether the stage is finished and every request has an answer."""
    finished = finished_text(recipe, base)
    return finished is not None and not missing_answers(finished)


def _require_other_text(job: Job, out: Path) -> None:
    """Raise DataError if other training text cannot be read or learned, because the data stage
    reads it only after the teacher has answered. Large sources and Hub sources are only checked in
    their first rows."""
    data = job.recipe.data
    tokenizer = load_tokenizer(job.tokenizer)
    for source in (*data.sources, *data.heldout_sources):
        if names(source, out, job.base):
            continue
        hub = isinstance(source, HubSource)
        some = hub or size_estimate([source], job.base) > MOST_CHARACTERS
        documents = itertools.islice(read_sources([source], job.base), FIRST_ROWS if some else None)
        require_rows(documents, tokenizer, data)


FIRST_ROWS = 100
MOST_CHARACTERS = 50_000_000
"""The maximum size of a source whose rows are all checked, which takes about a minute."""


def _require_out(recipe: Recipe, section: SynthesizeRecipe, base: Path) -> None:
    """Raise RecipeError if the text cannot be written, or would overwrite its own input."""
    out = out_path(section, base)
    for key, path in input_files(section).items():
        if (base / path).resolve() == out.resolve():
            raise RecipeError(
                f"the result would replace the file of synthesize.{key}",
                where=f"synthesize.out: {section.out}",
                fix="set synthesize.out to a different name",
            )
    if not may_replace(out, recipe):
        raise RecipeError(
            f"the result would replace {out}, but the run folder has no record that this recipe "
            "wrote it",
            where=f"synthesize.out: {section.out}",
            fix="move the file out of the way, or set synthesize.out to a different name",
        )
    folder = next(parent for parent in out.parents if parent.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise RunError(
            "the synthesized text cannot be written here",
            where=out,
            fix="set synthesize.out to the path of a file in a writable folder",
        )


def check_synthesis(check: Check) -> Iterator[Finding]:
    """Report how much has been answered and what the rest costs: an estimate from the answers so
    far, and an upper bound."""
    recipe, base = check.job.recipe, check.job.base
    section = recipe.synthesize
    if section is None:
        return
    job = synthesis_job(recipe, base)
    estimate = estimate_synthesis(job, check.calls)
    yield from findings(estimate, job.journal, "synthesis")
    choice, samples = section.filters.best_of, section.prompts.samples
    if verdicts := most_requests(choice, estimate.requests, samples):
        yield Finding("estimate", "judge", f"at most {verdicts:,} requests to the judge")
    if not makes_text(recipe, base):
        text = f"no data source names {section.out}, so `stillhouse run` synthesizes nothing"
        fix = f"add {{kind: jsonl, path: {section.out}}} to data.sources to train on it"
        yield Finding("warning", "synthesis", text, fix)


def synthesis_spending(job: Job, *, complete: bool = False) -> Iterator[str]:
    """Describe what would be spent without a budget. complete: whether to include answers that a
    finished stage lacks, which `stillhouse synthesize` requests again."""
    recipe, base = job.recipe, job.base
    section = recipe.synthesize
    if section is None or not (complete or makes_text(recipe, base)):
        return
    finished = finished_text(recipe, base)
    if finished is not None and not (complete and missing_answers(finished)):
        return
    choice = section.filters.best_of
    judge = choice if isinstance(choice, JudgeChoice) else None
    teacher_costs = may_cost(section.teacher.api, section.budget)
    judge_costs = judge is not None and may_cost(judge.teacher.api, judge.budget)
    if not teacher_costs and not judge_costs:
        return
    estimate = estimate_synthesis(synthesis_job(recipe, base))
    if teacher_costs and estimate.missing:
        yield estimate.described()
    if judge_costs:
        verdicts = most_requests(choice, estimate.requests, section.prompts.samples)
        yield f"at most {verdicts:,} requests to the judge"


@dataclass(frozen=True)
class PlannedText:
    """Synthesized text that training will read.

    documents: some of its rows, from the answers so far. times: how many times as much text there
    will be, before filters. other_sources: the data sources that read something else. tokens: the
    maximum number of answer tokens, set while there are no documents.
    """

    documents: list[Conversation]
    times: float
    other_sources: list[Source]
    tokens: int = 0


def planned_text(recipe: Recipe, base: Path, most: int) -> PlannedText | None:
    """Return the planned text; None if `data` does not read synthesized text. most: the maximum
    number of documents."""
    section = recipe.synthesize
    if section is None or not makes_text(recipe, base):
        return None
    out = out_path(section, base)
    others = [source for source in recipe.data.sources if not names(source, out, base)]
    stage = finished_text(recipe, base)
    if stage is not None:
        path = str((stage.path / TEXT).absolute())
        source = FileSource(kind="jsonl", path=path, limit=most)
        documents = [d for d in read_sources([source], base) if isinstance(d, Conversation)]
        return PlannedText(documents, stage.summary["kept"] / max(1, len(documents)), others)
    job = synthesis_job(recipe, base)
    rows = answered_rows(job, most)
    made = [
        {"messages": [*row.messages, {"role": "assistant", "content": row.text}]}
        for row in rows
        if row.text
    ]
    read = (document_from_row(row, "text", "the journal") for row in made)
    documents = [document for document in read if isinstance(document, Conversation)]
    estimate = estimate_synthesis(job)
    most = 0 if documents else estimate.requests * section.sampling.max_tokens
    return PlannedText(documents, estimate.requests / max(1, len(documents)), others, most)

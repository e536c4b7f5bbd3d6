"""Checks a recipe's training text before all of it is tokenized."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from stillhouse.data.chat_template import DATE, writes_date
from stillhouse.data.data_config import FileSource, Source, TextSource
from stillhouse.data.data_files import conversion, extension_of
from stillhouse.data.documents import AnyDocument, Conversation, row_size
from stillhouse.data.file_search import other_texts, unread_files, unread_summary
from stillhouse.data.sources import (
    estimated_tokens,
    has_unknown_size,
    read_sources,
    source_files,
)
from stillhouse.data.tokenize_rows import TokenRow, tokenize
from stillhouse.data.turn_end import turn_end
from stillhouse.export.licenses import license_lines
from stillhouse.finding import Finding, Level
from stillhouse.language_model.alignment_check import check_alignment
from stillhouse.language_model.job import Job
from stillhouse.language_model.model_origins import origins_of
from stillhouse.language_model.synthesis_check import PlannedText, planned_text
from stillhouse.pipeline.kind import Check
from stillhouse.teachers.load_model import load_tokenizer

TOPIC = "chat template"


def check_turns(job: Job) -> Iterator[Finding]:
    """Check the chat template for training text that contains chats."""
    student = load_tokenizer(job.tokenizer)
    teacher = load_tokenizer(job.teacher)
    end, other = turn_end(student), turn_end(teacher)
    if end is not None:
        learned = f"{end.text} ends each assistant turn and is learned, so that it ends answers"
        yield Finding("ok", TOPIC, f"loss on assistant turns; {learned}; see `stillhouse preview`")
        if not end.written:
            text = f"it writes no token after an assistant turn, so {end.text} is added to each"
            fix = "use a template that writes one, so that several turns can share a row"
            yield Finding("warning", TOPIC, text, fix)
        if job.folded:
            text = (
                "each model's own template renders the chats, unless both tokenize a chat "
                "identically"
            )
            yield Finding("ok", TOPIC, text)
        elif other is not None and other.text != end.text:
            text = f"the teacher's turns end with {other.text}, but the student's with {end.text}"
            fix = (
                "the student's template is used for both, so its end-of-turn token may be new to "
                "the teacher: copy the teacher's chat_template.jinja into the student's folder"
            )
            yield Finding("warning", TOPIC, text, fix)
    if writes_date(student):
        text = f"it writes the date, which is set to {DATE:%d %B %Y} in every run"
        yield Finding("ok", TOPIC, text)


SAMPLE_DOCUMENTS = 400
SAMPLE_CHARACTERS = 400_000
TOKENS = "tokens"
"""In `Check.found`: the number of tokens in all sources; absent if it cannot be estimated yet."""


def check_data(check: Check) -> Iterator[Finding]:
    """Check a sample of the training text."""
    job: Job = check.job
    yield Finding("ok", "teacher", job.teacher.described)
    same = "shared by both models"
    if job.folded:
        same = "the student's (the teacher has a different tokenizer)"
    yield Finding("ok", "vocabulary", f"{job.vocabulary:,} tokens, {same}")
    yield from license_lines(origins_of(job)[1:])
    planned = planned_text(job.recipe, job.base, SAMPLE_DOCUMENTS)
    if planned is not None and not planned.documents and not planned.other_sources:
        fix = f"run `stillhouse check {check.path} --calls 5` to generate some of it"
        text = "none of the synthesized text exists yet, so training cannot be estimated"
        yield Finding("warning", "data", text, fix)
        return
    sample = _sample(job, planned)
    check.found[TOKENS] = sample.tokens
    yield from _not_read(job, job.recipe.data.sources if planned is None else planned.other_sources)
    yield from _findings(sample, job)
    yield from check_alignment(job, sample.rows)


@dataclass(frozen=True)
class Sample:
    """The first documents, tokenized.

    tokens: an estimate for all sources. complete: whether the sample is the entire text. at_least:
    whether a dataset may contain any number of further tokens. notes: the number of rows with
    something that is not learned or not read, by kind. rows: the documents' places and tokens.
    """

    documents: int
    conversations: int
    supervised_share: float
    longest: int
    tokens: int
    complete: bool
    at_least: bool
    notes: Counter[str]
    rows: list[tuple[str, TokenRow]]


def _sample(job: Job, planned: PlannedText | None) -> Sample:
    tokenizer = load_tokenizer(job.tokenizer)
    data = job.recipe.data
    sources = data.sources if planned is None else planned.other_sources
    documents: list[AnyDocument] = [] if planned is None else list(planned.documents)
    characters, complete = sum(map(row_size, documents)), planned is None
    written = characters * (planned.times if planned else 0.0)
    most = 0 if planned is None else planned.tokens
    for document in read_sources(sources, job.base):
        if len(documents) >= SAMPLE_DOCUMENTS or characters >= SAMPLE_CHARACTERS:
            complete = False
            break
        documents.append(document)
        characters += row_size(document)
    tokenized = tokenize(documents, tokenizer, data.control_tokens)
    rows = [
        (document.where, row)
        for document, of_document in zip(documents, tokenized, strict=True)
        for row in of_document
    ]
    notes = Counter(note for document in documents for note in document.about.notes)
    notes.update(note for _, row in rows for note in row.notes)
    tokens = sum(len(row.ids) for _, row in rows)
    supervised = sum(int(row.supervised.sum()) for _, row in rows)
    rate = tokens / max(1, characters)
    expected = most + round(written * rate + estimated_tokens(sources, job.base, rate))
    if all(source.tokens is None for source in sources):
        expected = tokens if complete else max(tokens, expected)
    unknown = not complete and has_unknown_size(sources)
    if unknown:  # at most as many as the recipe uses
        expected = max(expected, data.heldout_tokens + (data.train_tokens or 0))
    return Sample(
        documents=len(documents),
        conversations=sum(isinstance(document, Conversation) for document in documents),
        supervised_share=supervised / max(1, tokens),
        longest=max((len(row.ids) for _, row in rows if not row.splittable), default=0),
        tokens=expected,
        complete=complete,
        at_least=unknown and data.train_tokens is None,
        notes=notes,
        rows=rows,
    )


def _not_read(job: Job, sources: Sequence[Source]) -> Iterator[Finding]:
    """Warn about files in the sources' folders that are not read, or only if they are named."""
    named = [one for one in sources if isinstance(one, TextSource | FileSource)]
    read = {file for source in named for file in source_files(source, job.base)}
    for source in named:
        folder = (job.base / source.path).absolute()
        others = set(other_texts(folder)) - read if folder.is_dir() else set()
        endings = Counter(extension_of(file) for file in others)
        for ending, count in sorted(endings.items()):
            yield Finding(
                "warning",
                "data",
                f"{count:,} {ending} file{'s' * (count > 1)} in {source.path} "
                f"{'are' if count > 1 else 'is'} not read",
                f"add a source: {{kind: text, path: {source.path.rstrip('/')}/**/*{ending}}}",
            )
        unread = unread_files(folder) if folder.is_dir() else {}
        if unread:
            first = max(unread.values(), key=len)[0]
            fix = conversion(first) or "convert them to one of the formats in docs/data.md#files"
            what = f"not read in {source.path}: {unread_summary(unread)}"
            yield Finding("warning", "data", what, f"if they belong to the text, {fix}")


def _findings(sample: Sample, job: Job) -> Iterator[Finding]:
    section = job.recipe.data
    about = "" if sample.complete else "at least " if sample.at_least else "about "
    chats = f", {sample.conversations} of them chats" if sample.conversations else ""
    yield Finding(
        "ok",
        "data",
        f"{about}{sample.tokens:,} tokens; {sample.documents:,} documents sampled{chats}; "
        f"the loss mask keeps {sample.supervised_share:.0%} of the tokens",
    )
    if sample.conversations:
        yield from check_turns(job)
    for text, count in sample.notes.most_common():
        yield Finding("ok", "data", f"{count:,} of the rows: {text}")
    if sample.longest > section.context:
        text = f"a row has {sample.longest:,} tokens; the context is {section.context:,}"
        fix = f"set data.context to {sample.longest}, or data.long_rows to truncate or drop"
        level: Level = "error" if section.long_rows == "error" else "warning"
        yield Finding(level, "data", text, fix)
    held = 0 if section.heldout_sources else section.heldout_tokens
    if section.train_tokens and sample.complete and sample.tokens < held + section.train_tokens:
        yield Finding(
            "warning",
            "data",
            f"the text has only {sample.tokens:,} tokens, fewer than train_tokens + heldout_tokens",
            "all of it will be used",
        )

"""The stage that builds a signal store from the log-probabilities in an API's answers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from stillhouse.data.row_formats import document_from_row
from stillhouse.data.shift import IGNORED
from stillhouse.data.tokenize_rows import TokenRow, tokenize
from stillhouse.errors import SignalError
from stillhouse.generation.answer_logprobs import (
    Aligned,
    ByteVocabulary,
    ChunkedAnswer,
    align,
    align_chunks,
    chunk_rows,
    entry_rows,
)
from stillhouse.generation.journal import Journal
from stillhouse.language_model.job import Job, planned_objective, signals_encoding
from stillhouse.language_model.signals_stage import STORE, signal_identity
from stillhouse.language_model.synthesis_stage import synthesis_job
from stillhouse.progress import bar, note
from stillhouse.runfolder import Outcome, StagePlan
from stillhouse.signals.encode import Statistics
from stillhouse.signals.encoded_rows import EntryRows
from stillhouse.signals.encodings import AnswerChunks
from stillhouse.signals.manifest import Settings
from stillhouse.signals.segments import find_segments
from stillhouse.signals.writer import StoreWriter
from stillhouse.synthesis.synthesize import REQUESTS
from stillhouse.teachers.load_model import load_tokenizer
from stillhouse.teachers.stored_teacher import recorded_temperature

_TOGETHER = 256
_Found = Aligned | ChunkedAnswer
BIAS = (
    "log-probabilities as the server returned them, for its own context of each token, rounded to "
    "float16; the tail is one bucket; tokens that it did not report have all the mass themselves"
)


@dataclass
class Counted:
    """Counts over the answers.

    answers: rows of the text. mismatched: answers whose tokens differ from the student's, or, for
    chunks, whose text has no log-probabilities. tokens: supervised tokens. reported: supervised
    tokens whose log-probabilities the API returned.
    """

    answers: int = 0
    mismatched: int = 0
    tokens: int = 0
    reported: int = 0


def plan_api_signals(job: Job) -> StagePlan:
    """Plan the store for the run's synthesized text.

    Raises SignalError if `data` does not read the synthesized text or a term needs a different
    temperature. The work raises it if too many answers are tokenized differently.
    """
    recipe = job.recipe
    section, synthesis, text = recipe.signals, recipe.synthesize, job.text
    assert section is not None
    assert section.answers is not None
    assert synthesis is not None
    if text is None:
        raise SignalError(
            "signals.answers needs the synthesized text, but no data source reads synthesize.out",
            where="data.sources",
            fix=f"add {{kind: jsonl, path: {synthesis.out}}}",
        )
    objective = planned_objective(job)
    encoding = signals_encoding(job, objective)
    temperature = recorded_temperature(encoding, objective.needs)
    if temperature != 1.0:
        raise SignalError(
            f"an API returns probabilities at temperature 1, but a term uses {temperature:g}",
            where="objective.terms",
            fix="use temperature 1",
        )
    identity = signal_identity(job, None)
    most = section.answers.mismatched
    chunks = isinstance(encoding, AnswerChunks)

    def work(out: Path) -> Outcome:
        counted = _count(job, text.file, chunks)
        _check(counted, most, chunks)
        provenance = {
            "asked": identity["teacher"],
            "text": text.sha256,
            "bias": encoding.bias if chunks else BIAS,
            "reported": f"{counted.reported} of {counted.tokens} tokens",
            "mismatched": f"{counted.mismatched} of {counted.answers} answers",
        }
        settings = Settings(encoding, job.vocabulary, identity, 1.0, recipe.seed, provenance)
        with StoreWriter(out / STORE, settings) as writer:
            for row, aligned in _rows(job, text.file, "signals", chunks):
                ids_1L = torch.from_numpy(row.ids[None].astype(np.int64))
                supervised_1L = torch.from_numpy(row.supervised[None].copy())
                supervised_1L[:, 0] = False
                segments = find_segments(ids_1L, ids_1L.masked_fill(~supervised_1L, IGNORED))
                if len(segments) and writer.missing(segments).all():
                    writer.add(segments, *_encoded(aligned, job.vocabulary))
            manifest = writer.finish()
        shown = f"{counted.reported:,} of {counted.tokens:,} tokens"
        note(f"the API returned log-probabilities for {shown}")
        facts = {**asdict(manifest.quality), "store_bytes": manifest.bytes, **asdict(counted)}
        return Outcome(summary=facts)

    inputs = {
        "recipe": section.answers.model_dump(mode="json"),
        "kind": encoding.kind,
        "k": synthesis.sampling.top_logprobs,
        "text": text.sha256,
        "reasoning": synthesis.reasoning,
        "context": recipe.data.context,
        "long_rows": recipe.data.long_rows,
        "vocabulary": job.vocabulary,
        **identity,
    }
    return StagePlan("signals", inputs, work)


def _encoded(found: _Found, vocabulary: int) -> tuple[EntryRows, Statistics]:
    if isinstance(found, ChunkedAnswer):
        return chunk_rows(found, vocabulary)
    return entry_rows(found.entries, vocabulary)


def _count(job: Job, file: Path, chunks: bool) -> Counted:
    counted = Counted()
    for _, aligned in _rows(job, file, "comparing tokens", chunks):
        counted.answers += 1
        counted.mismatched += not aligned.matched
        counted.tokens += len(aligned.reported)
        counted.reported += sum(aligned.reported)
    return counted


def _check(counted: Counted, most: float, chunks: bool) -> None:
    if not counted.mismatched:
        return
    if chunks:
        problem = "have no log-probabilities for their text"
        better = "use an API that returns the bytes of its tokens"
    else:
        problem = (
            "are tokenized differently by the API and the student's tokenizer, or have no "
            "log-probabilities"
        )
        better = (
            "use a student with the API model's tokenizer; or, with a different tokenizer, use the "
            "terms {kind: chunks} and cross_entropy"
        )
    mismatch = f"{counted.mismatched:,} of {counted.answers:,} answers {problem}"
    if counted.mismatched > most * counted.answers:
        raise SignalError(
            mismatch,
            where="signals.answers",
            fix=f"{better}; or raise signals.answers.mismatched to learn these only from their "
            "text; or remove `signals`",
        )
    note(f"{mismatch}: the student learns these only from their text")


def _rows(job: Job, file: Path, what: str, chunks: bool) -> Iterator[tuple[TokenRow, _Found]]:
    """Yield every row of tokens that training can read, with its signal."""
    section = job.recipe.synthesize
    assert section is not None
    k = section.sampling.top_logprobs
    assert k is not None
    tokenizer = load_tokenizer(job.tokenizer)
    words = ByteVocabulary.of(tokenizer, job.vocabulary)

    def found(row: TokenRow, content: str, logprobs: list[Any] | None) -> _Found:
        if chunks:
            return align_chunks(row, content, logprobs, words)
        return align(row, content, logprobs, k, words)

    keys = (file.parent / REQUESTS).read_text(encoding="utf-8").split()
    path = synthesis_job(job.recipe, job.base).journal
    with (
        Journal(path) as journal,
        file.open(encoding="utf-8") as lines,
        bar(what, len(keys), "answers") as advance,
    ):
        pairs = zip(lines, keys, strict=True)
        while batch := list(islice(pairs, _TOGETHER)):
            raw = [json.loads(line) for line, _ in batch]
            documents = [document_from_row(one, "text", str(file)) for one in raw]
            given = [one for one in documents if one is not None]
            tokenized = tokenize(given, tokenizer, job.recipe.data.control_tokens)
            for one, (_, key), rows in zip(raw, batch, tokenized, strict=True):
                answer = journal.get(key)
                logprobs = None if answer is None else answer.logprobs
                content = one["messages"][-1]["content"]
                for row in rows:
                    if row is rows[-1]:
                        aligned = found(row, content, logprobs)
                    else:  # an earlier turn, if the template rewrites earlier turns
                        aligned = replace(found(row, "", None), matched=True)
                    cut = _cut(row, aligned, job)
                    if cut is not None:
                        yield cut
            advance(len(batch))


def _cut(row: TokenRow, aligned: _Found, job: Job) -> tuple[TokenRow, _Found] | None:
    """Fit a row to the context the way the data stage does; None if it is dropped."""
    context = job.recipe.data.context
    if len(row.ids) <= context:
        return row, aligned
    if job.recipe.data.long_rows != "truncate":
        return None
    short = TokenRow(row.ids[:context], row.supervised[:context], False)
    kept = int(short.supervised[1:].sum())
    return short, aligned.first(kept)

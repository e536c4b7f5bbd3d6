"""Looks at a recipe before anything is spent: what would fail, and what it will take."""

from __future__ import annotations

import importlib.util
import itertools
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.markup import escape
from rich.table import Table

from stillhouse.answering.answering_check import foresee_answers
from stillhouse.classify.classify_check import foresee
from stillhouse.classify.classify_config import ClassifyRecipe
from stillhouse.config.load import load_any_recipe
from stillhouse.config.members import first_member
from stillhouse.config.recipe import Recipe
from stillhouse.consent import ComingText, coming_text, synthesis_findings
from stillhouse.data.documents import AnyDocument, Conversation, Document
from stillhouse.data.sources import read_sources, size_estimate
from stillhouse.data.tokenize_rows import tokenize
from stillhouse.errors import StillhouseError
from stillhouse.export.licenses import license_lines
from stillhouse.export_check import foresee_exports
from stillhouse.finding import Finding, Level
from stillhouse.hardware import (
    tune_allocator,
)
from stillhouse.job import (
    Job,
    configs,
    find_models,
    planned_members,
    planned_size,
)
from stillhouse.runner import run_folder
from stillhouse.stages.model_origins import origins_of
from stillhouse.teachers.load import load_tokenizer
from stillhouse.training_estimate import foresee_costs

SAMPLE_DOCUMENTS = 400
SAMPLE_CHARACTERS = 400_000
STYLES = {"ok": "green", "estimate": "cyan", "warning": "yellow", "error": "bold red"}


def check_recipe(
    path: str | Path, overrides: Sequence[str] = (), *, calls: int = 0
) -> list[Finding]:
    """Everything found, in the order of the run; an error ends what depends on it.

    calls: real requests to make of a teacher of text, to foresee what the others cost.
    Weights are not loaded (except a local text teacher's, for calls) and nothing is trained. Of a
    model of the Hub only the configuration and tokenizer are fetched; a GGUF file is converted,
    since only then are they there.
    """
    tune_allocator()
    findings: list[Finding] = []
    try:
        for finding in _examine(Path(path), overrides, calls):
            findings.append(finding)
    except StillhouseError as error:
        where = f" ({error.where})" if error.where else ""
        findings.append(Finding("error", _topic(error), f"{error.what}{where}", error.fix))
    return findings


def findings_table(findings: Sequence[Finding]) -> Table:
    table = Table(show_header=False, box=None, padding=(0, 1))
    for finding in findings:
        text = escape(finding.text) + (f"\n[dim]{escape(finding.fix)}[/]" if finding.fix else "")
        style = STYLES[finding.level]
        table.add_row(f"[{style}]{finding.level}[/]", f"[bold]{finding.topic}[/]", text)
    return table


def _topic(error: StillhouseError) -> str:
    return type(error).__name__.removesuffix("Error").lower()


def _examine(path: Path, overrides: Sequence[str], calls: int) -> Iterator[Finding]:
    whole = load_any_recipe(path, overrides)
    if not isinstance(whole, Recipe):
        yield Finding("ok", "recipe", f"{path} is valid")
        if isinstance(whole, ClassifyRecipe):
            yield from foresee(whole, path.parent, calls)
        else:
            yield from foresee_answers(whole, path.parent, calls)
        return
    yield Finding("ok", "recipe", f"{path} is valid")
    recipe = first_member(whole)
    yield from _folder(recipe)
    yield from _extras(recipe)
    yield from synthesis_findings(recipe, path.parent, calls)
    job = find_models(recipe, path.parent, weights=False)
    yield Finding("ok", "teacher", job.teacher.described)
    yield Finding("ok", "vocabulary", f"{job.vocabulary:,} tokens, the same in both models")
    yield from foresee_exports(whole.with_programs(path.parent), job)
    yield from license_lines(origins_of(job)[1:])
    coming = coming_text(recipe, path.parent, SAMPLE_DOCUMENTS)
    if coming is not None and not coming.documents:
        fix = f"stillhouse check {path} --calls 5 asks for some of it"
        text = "nothing of the synthesized text is there: its training cannot be foreseen"
        yield Finding("warning", "data", text, fix)
        return
    sample = _sample(job, coming)
    yield from _data(sample, recipe)
    yield from foresee_costs(job, sample.tokens)
    if whole.cascade is not None:
        yield from _hops(whole, job)


def _hops(recipe: Recipe, first: Job) -> Iterator[Finding]:
    teacher = planned_size(configs(first)[1]).total
    for name, config in planned_members(recipe, first):
        size = planned_size(config).total
        text = f"{name}: {size / 1e6:,.1f}M parameters, {size / teacher:.0%} of the teacher's"
        yield Finding("estimate", "cascade", text)


def _folder(recipe: Recipe) -> Iterator[Finding]:
    folder = run_folder(recipe).root
    existing = next(parent for parent in [folder, *folder.absolute().parents] if parent.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        yield Finding("error", "run folder", f"{folder} cannot be written", "--set folder=PATH")
    else:
        yield Finding("ok", "run folder", str(folder))


def _extras(recipe: Recipe) -> Iterator[Finding]:
    wanted = {name: f"pip install {name}" for name in recipe.train.report_to}
    if recipe.evaluate.lm_eval is not None:
        wanted["lm_eval"] = "pip install 'stillhouse[eval]'"
    for module, install in wanted.items():
        if importlib.util.find_spec(module) is None:
            yield Finding("error", "extras", f"{module} is not installed", install)


# --- data ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sample:
    """The first documents, tokenized, and what they let one expect of the whole.

    tokens: of all sources. whole: the sample is everything.
    """

    documents: int
    conversations: int
    sampled_tokens: int
    supervised_share: float
    longest: int
    tokens: int
    whole: bool


def _sample(job: Job, coming: ComingText | None) -> Sample:
    tokenizer = load_tokenizer(job.tokenizer_path, trust_remote_code=job.trust_remote_code)
    sources = job.recipe.data.sources if coming is None else coming.other_sources
    documents: list[AnyDocument] = [] if coming is None else list(coming.documents)
    characters, whole = sum(len(str(document)) for document in documents), coming is None
    everything = size_estimate(sources, job.base)
    if coming is not None:
        everything += round(characters * coming.times)
    for document in read_sources(sources, job.base):
        if len(documents) >= SAMPLE_DOCUMENTS or characters >= SAMPLE_CHARACTERS:
            whole = False
            break
        documents.append(document)
        characters += len(document.text) if isinstance(document, Document) else len(str(document))
    rows = list(itertools.chain.from_iterable(tokenize(documents, tokenizer)))
    tokens = sum(len(row.ids) for row in rows)
    supervised = sum(int(row.supervised.sum()) for row in rows)
    expected = tokens if whole else round(tokens * max(1.0, everything / max(1, characters)))
    return Sample(
        documents=len(documents),
        conversations=sum(isinstance(document, Conversation) for document in documents),
        sampled_tokens=tokens,
        supervised_share=supervised / max(1, tokens),
        longest=max((len(row.ids) for row in rows if not row.splittable), default=0),
        tokens=expected,
        whole=whole,
    )


def _data(sample: Sample, recipe: Recipe) -> Iterator[Finding]:
    section = recipe.data
    about = "" if sample.whole else "about "
    kind = f", {sample.conversations} of them chats" if sample.conversations else ""
    yield Finding(
        "ok",
        "data",
        f"{about}{sample.tokens:,} tokens; {sample.documents:,} documents looked at{kind}; "
        f"{sample.supervised_share:.0%} of tokens are learnt from",
    )
    if sample.conversations:
        yield Finding("ok", "chat template", "loss on assistant turns; look: stillhouse preview")
    if sample.longest > section.context:
        text = f"a row has {sample.longest:,} tokens; the context is {section.context:,}"
        fix = f"data.context={sample.longest}, or data.long_rows: truncate or drop"
        level: Level = "error" if section.long_rows == "error" else "warning"
        yield Finding(level, "data", text, fix)
    held = 0 if section.heldout_sources else section.heldout_tokens
    if section.train_tokens and sample.whole and sample.tokens < held + section.train_tokens:
        yield Finding(
            "warning",
            "data",
            f"{sample.tokens:,} tokens are fewer than train_tokens + heldout_tokens",
            "all there are will be used",
        )

"""Looks at a recipe before anything is spent: what would fail, and what it will take."""

from __future__ import annotations

import importlib.util
import itertools
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import psutil
import torch
from rich.markup import escape
from rich.table import Table

from stillhouse import account
from stillhouse.answering.plan import foresee_answers
from stillhouse.data.documents import AnyDocument, Conversation, Document
from stillhouse.data.sources import read_sources, size_estimate
from stillhouse.data.tokens import tokenize
from stillhouse.errors import StillhouseError
from stillhouse.export import license_lines
from stillhouse.hardware import (
    choose_precision,
    default_device,
    matmul_rate,
    tune_allocator,
    world_size,
)
from stillhouse.job import (
    Job,
    configs,
    find_models,
    planned_members,
    planned_model,
    planned_objective,
    planned_size,
)
from stillhouse.quantize import told_left_over
from stillhouse.recipe import ClassifyRecipe, load_any_recipe
from stillhouse.recipe.family import first_member
from stillhouse.recipe.schema import Recipe
from stillhouse.recipe.signals import (
    FrozenHeadSignals,
    HiddenSignals,
    SampledSignals,
    SignalsRecipe,
    StratifiedSignals,
    ThresholdSignals,
    TopKSignals,
    TopPSignals,
)
from stillhouse.runner import run_folder
from stillhouse.shipping_plan import foresee_exports
from stillhouse.signals.manifest import read_manifest
from stillhouse.spending import ComingText, coming_text, synthesis_findings
from stillhouse.stages.origins import origins_of
from stillhouse.tasks.plan import foresee
from stillhouse.teachers import load_tokenizer
from stillhouse.training import plan_batches, stored_layers

Level = Literal["ok", "estimate", "warning", "error"]

SAMPLE_DOCUMENTS = 400
SAMPLE_CHARACTERS = 400_000
EFFICIENCY = 0.55
"""Share of the measured matrix product rate that a training step reaches (bench/step)."""
SEGMENT_BYTES = 2.0
"""Keys, offsets and checksums of a store, a token, for documents of some hundred tokens or less."""
ADAM_BYTES = 16
"""A parameter: float32 weight, gradient and two moments."""
STYLES = {"ok": "green", "estimate": "cyan", "warning": "yellow", "error": "bold red"}


@dataclass(frozen=True)
class Finding:
    """One line of the check. fix: what to do about a warning or an error."""

    level: Level
    topic: str
    text: str
    fix: str | None = None


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
            yield from (Finding(*line) for line in foresee(whole, path.parent, calls))
        else:
            yield from (Finding(*line) for line in foresee_answers(whole, path.parent, calls))
        return
    yield Finding("ok", "recipe", f"{path} is valid")
    recipe = first_member(whole)
    yield from _folder(recipe)
    yield from _extras(recipe)
    for finding in synthesis_findings(recipe, path.parent, calls):
        yield Finding(*finding)
    job = find_models(recipe, path.parent, weights=False)
    yield Finding("ok", "teacher", job.teacher.described)
    yield Finding("ok", "vocabulary", f"{job.vocabulary:,} tokens, the same in both models")
    shipping = foresee_exports(whole.with_programs(path.parent), job)
    for line in [*shipping, *license_lines(origins_of(job)[1:])]:
        yield Finding(*line)
    if whole.quantize and (left := told_left_over(planned_model(configs(job)[0]))):
        yield Finding("warning", "quantize", left)
    coming = coming_text(recipe, path.parent, SAMPLE_DOCUMENTS)
    if coming is not None and not coming.documents:
        fix = f"stillhouse check {path} --calls 5 asks for some of it"
        text = "nothing of the synthesized text is there: its training cannot be foreseen"
        yield Finding("warning", "data", text, fix)
        return
    sample = _sample(job, coming)
    yield from _data(sample, recipe)
    yield from _costs(job, sample)
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


# --- costs -----------------------------------------------------------------------------------


def _costs(job: Job, sample: Sample) -> Iterator[Finding]:
    recipe = job.recipe
    section = recipe.train
    student_config, teacher_config = configs(job)
    teacher, student = planned_size(teacher_config), planned_size(student_config)
    yield Finding(
        "estimate",
        "student",
        f"{student.total / 1e6:,.1f}M parameters ({student.total / teacher.total:.0%} of the "
        f"teacher's {teacher.total / 1e6:,.1f}M), {student.non_embedding / 1e6:,.1f}M without "
        "embeddings",
    )
    tokens = sample.tokens - (0 if recipe.data.heldout_sources else recipe.data.heldout_tokens)
    tokens = max(1, min(tokens, recipe.data.train_tokens or tokens))
    windows = max(1, -(-tokens // recipe.data.context))
    plan = plan_batches(section, windows, world_size())
    steps_tokens = plan.steps * section.batch_size * recipe.data.context
    live = teacher.head_once if recipe.signals is None else 0
    flops = account.distillation_flops(student.head_once, live, steps_tokens)
    device = default_device()
    precision = choose_precision(section.precision, device)
    rate = EFFICIENCY * matmul_rate(precision.dtype, device)
    asking = account.forward_flops(teacher.head_once, tokens) / rate
    yield from _signals(job, tokens, steps_tokens / tokens, asking, teacher, student)
    yield Finding(
        "estimate",
        "training",
        f"{plan.steps:,} steps of {section.batch_size} x {recipe.data.context} tokens: "
        f"{steps_tokens:,} tokens, {flops / 1e12:,.0f} TFLOP, about "
        f"{_duration(flops / rate)} at {rate / 1e9:,.0f} GFLOP/s ({precision.reason})",
    )
    need = _training_memory(student, teacher, student_config, plan.micro, recipe, precision.dtype)
    yield _memory(need, device)
    yield _disk(job, student)


def _signals(
    job: Job,
    tokens: int,
    passes: float,
    asking: float,
    teacher: account.ParameterCount,
    student: account.ParameterCount,
) -> Iterator[Finding]:
    """What a store costs and saves. passes: times each token is trained on; asking: seconds in
    which the teacher answers about every token once."""
    section = job.recipe.signals
    if section is not None and section.store is not None:
        manifest = read_manifest(job.base / section.store)
        kind = manifest.settings.encoding.kind
        text = f"{section.store}: {manifest.rows:,} tokens of kind {kind}, asked before"
        yield Finding("ok", "signals", text)
        return
    if section is not None and section.answers is not None:
        yield Finding("ok", "signals", "what the API tells about the tokens of its answers")
        return
    size = f"{tokens * _row_bytes(job, section or SignalsRecipe()) / 1e6:,.0f} MB"
    faster = f"{1 + teacher.head_once / (3 * student.head_once):.1f} times as fast"
    if section is not None:
        text = f"the teacher is asked once, about {_duration(asking)}, and {size} are stored"
        if passes < 2:
            text += f"; it pays from a second student or epoch on, which then trains {faster}"
        else:
            text += f"; {passes:.0f} epochs save about {_duration((passes - 1) * asking)}"
        yield Finding("estimate", "signals", text)
    elif passes >= 2:
        text = f"the teacher is asked {passes:.0f} times about the same text"
        saved = _duration((passes - 1) * asking)
        fix = f"add `signals: {{}}`: it is asked once, which saves about {saved} for {size}"
        yield Finding("estimate", "signals", text, fix)
    else:
        text = (
            f"the teacher answers live; with `signals: {{}}` ({size}) a second student or epoch "
            f"trains {faster}"
        )
        yield Finding("estimate", "signals", text)


def _row_bytes(job: Job, section: SignalsRecipe) -> float:
    """Bytes of a stored token, about: docs/signal-store.md has the encodings' sizes."""
    encoding = section.encoding
    match encoding:
        case ThresholdSignals():
            row = encoding.bytes
        case TopKSignals():
            row = 5.0 + 4 * encoding.k
        case TopPSignals():
            row = 5.0 + 4 * encoding.most / 4
        case SampledSignals():
            row = 1.0 + 3 * encoding.draws / 2
        case StratifiedSignals():
            row = 2.0 + 3 * encoding.k + 2 * encoding.draws
        case FrozenHeadSignals():
            row = 4.0 + 2 * configs(job)[0].get_text_config().hidden_size
        case HiddenSignals():
            teacher = configs(job)[1].get_text_config()
            layers = stored_layers(planned_objective(job), teacher)
            row = 2.0 * teacher.hidden_size * len(layers)
    return row + SEGMENT_BYTES


def _training_memory(
    student: account.ParameterCount,
    teacher: account.ParameterCount,
    config: Any,
    micro: int,
    recipe: Recipe,
    dtype: torch.dtype,
) -> int:
    """Bytes at the peak of a step. Activations by the usual count of tensors kept a layer."""
    text = config.get_text_config()
    tokens = micro * recipe.data.context
    wide = getattr(text, "intermediate_size", 4 * text.hidden_size)  # GPT-2 has no such key
    kept_a_layer = 12 * text.hidden_size + 4 * wide
    layers = 1 if recipe.train.gradient_checkpointing else text.num_hidden_layers
    activations = tokens * layers * kept_a_layer * 4
    low = dtype.itemsize if dtype != torch.float32 else 0
    weights = student.total * (ADAM_BYTES + low) + teacher.total * dtype.itemsize
    head = text.vocab_size * text.hidden_size * 4
    return weights + activations + head


def _memory(need: int, device: torch.device) -> Finding:
    if device.type == "cuda":
        available = torch.cuda.get_device_properties(device).total_memory
    else:
        available = psutil.virtual_memory().available
    text = f"about {need / 1e9:.1f} GB for training; {available / 1e9:.1f} GB are free on {device}"
    if need > available:
        fix = "lower train.micro_batch_size, or set train.gradient_checkpointing: true"
        return Finding("error", "memory", text, fix)
    return Finding("estimate", "memory", text)


def _disk(job: Job, student: account.ParameterCount) -> Finding:
    """Each checkpoint holds weights and two moments in float32; three models are kept beside."""
    keep = job.recipe.train.keep_checkpoints + 1
    need = student.total * (12 * keep + 4 + 4 + 2)
    free = shutil.disk_usage(next(p for p in Path.cwd().parents if p.exists())).free
    text = f"about {need / 1e9:.1f} GB at the peak; {free / 1e9:.1f} GB are free"
    if need > free:
        return Finding("error", "disk", text, "free some, or lower train.keep_checkpoints")
    return Finding("estimate", "disk", text)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} minutes"
    return f"{seconds / 3600:.1f} hours"

"""A task's recipe looked at before anything is spent: what it has, and what it will take."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Group, RenderableType
from rich.rule import Rule
from rich.text import Text
from transformers import AutoModelForCausalLM

from stillhouse import account
from stillhouse.export import license_lines, require_token
from stillhouse.export.onnx import require_onnx
from stillhouse.hardware import choose_precision, default_device, matmul_rate
from stillhouse.recipe import ClassifyRecipe
from stillhouse.synthesis import Known
from stillhouse.tasks.fit import planned_steps
from stillhouse.tasks.job import TaskJob
from stillhouse.tasks.judge import foreseen_questions
from stillhouse.tasks.prompts import LabelPrompt, prompt_tokens
from stillhouse.tasks.run import find_task
from stillhouse.tasks.scoring import shared_prefix
from stillhouse.tasks.texts import Texts, prepare_texts
from stillhouse.tasks.tree import label_tree
from stillhouse.teachers import load_config, load_tokenizer

Line = tuple[Literal["ok", "estimate", "warning"], str, str, str | None]
"""Level, topic, text, and what to do about a warning."""

EFFICIENCY = 0.35
"""Share of the measured matrix product rate that scoring reaches: its batches are small."""
FEW = 20
"""Training texts a label below which little can be learnt."""


def foresee(recipe: ClassifyRecipe, base: Path) -> Iterator[Line]:
    """Raises StillhouseError for whatever would stop the run."""
    texts = prepare_texts(recipe, base)
    yield "ok", "labels", f"{len(texts.labels)}: {', '.join(list(texts.labels)[:12])}", None
    parts = f"{len(texts.train):,} to learn from, {len(texts.calibration):,} for the threshold, "
    parts += f"{len(texts.test):,} to measure on"
    repeated = f"; {texts.repeated:,} repeated ones are left out" if texts.repeated else ""
    yield "ok", "texts", parts + repeated, None
    if len(texts.train) < FEW * len(texts.labels):
        few = f"{len(texts.train):,} training texts are few for {len(texts.labels)} labels"
        yield "warning", "texts", few, "give more texts: they need no labels"
    if any(row.gold is None for row in texts.test):
        unknown = "the test texts have no true labels: the student is compared with the teacher"
        yield "warning", "texts", unknown, "name their column: data.test.0.label"
    job = find_task(recipe, base)
    yield "ok", "teacher", job.described, None
    prompt = job.prompt(texts)
    if job.teacher is None:
        yield _api_cost(job, known_judgment(recipe, base))
    else:
        yield _local_cost(job, prompt, texts)
    steps = planned_steps(recipe.train, len(texts.train))
    yield "estimate", "training", f"{steps:,} steps of {recipe.train.batch_size} texts", None
    if recipe.export.formats != ["safetensors"]:
        require_onnx()
    if recipe.export.push_to_hub is not None:
        require_token(recipe.export.push_to_hub)
    yield "ok", "export", ", ".join(recipe.export.formats), None
    yield from license_lines(job.made_with)


def _local_cost(job: TaskJob, prompt: LabelPrompt, texts: Texts) -> Line:
    assert job.teacher is not None
    recipe = job.recipe
    words = prompt_tokens(prompt, load_tokenizer(job.teacher.path), recipe.data.max_tokens)
    sample = words.of([row.text for row in texts.all[:200]])
    shared, inner = shared_prefix(sample), label_tree(words.labels).inner
    each = sum(map(len, sample)) / len(sample) - shared + inner
    tokens = round(each * len(texts.all)) + shared
    device = default_device()
    precision = choose_precision(recipe.teacher.precision, device)
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(load_config(job.teacher.path))
    flops = account.forward_flops(account.count_parameters(model).head_once, tokens)
    seconds = flops / (EFFICIENCY * matmul_rate(precision.dtype, device))
    pairs = len(texts.all) * len(words.labels)
    text = (
        f"{tokens:,} tokens for {pairs:,} pairs of text and label, about {seconds:,.0f} s "
        f"({precision.reason}); {shared:,} tokens of the prompt are read once"
    )
    return "estimate", "judgment", text, None


def known_judgment(recipe: ClassifyRecipe, base: Path) -> Known:
    """How much the journal has of what an API is asked, and what the rest can cost at most."""
    job, texts = find_task(recipe, base), prepare_texts(recipe, base)
    with tempfile.TemporaryDirectory() as folder:
        return foreseen_questions(recipe, job.prompt(texts), texts, Path(folder), job.journal)


def _api_cost(job: TaskJob, known: Known) -> Line:
    api = job.recipe.teacher.api
    priced = api is not None and api.price is not None
    cost = f"${known.worst.usd:,.2f}" if priced else "a price unknown"
    text = f"{known.requests - known.missing:,} of {known.requests:,} requests are answered; "
    text += f"the rest takes at most {known.worst.tokens:,} tokens, {cost}"
    return "estimate", "judgment", text, None


def preview_task(recipe: ClassifyRecipe, base: Path, rows: int) -> RenderableType:
    """What the teacher reads for the first texts, and what it would answer for each label."""
    texts = prepare_texts(recipe, base)
    prompt = LabelPrompt.of(recipe.task, texts.labels)
    parts: list[RenderableType] = []
    for row in texts.train[:rows]:
        parts.append(Rule(row.where, style="dim", align="left"))
        if recipe.task.chat:
            for turn in prompt.turns(row.text):
                parts.append(Text.assemble((f"{turn['role']}: ", "dim"), turn["content"]))
        else:
            parts.append(Text(prompt.plain(row.text)))
    answers = [prompt.answer_for(label) for label in texts.labels]
    parts.append(Rule("answers that are scored", style="dim", align="left"))
    parts.append(Text(" | ".join(answers), style="bold green"))
    return Group(*parts)

"""The report sections that all kinds of runs share, and the facts that they are built from."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import yaml
from pydantic import BaseModel

from stillhouse import number_format as text
from stillhouse.evaluation.metrics_table import MetricsTable
from stillhouse.evaluation.results import Generation, role_name, role_order
from stillhouse.hardware import machine
from stillhouse.report.charts import ACCENT, PALE, Bar, BarChart, Chart, in_powers, role_color
from stillhouse.report.page import Answer, Figure, Folded, Report, Section, SideBySide
from stillhouse.runfolder import Cost, Stage
from stillhouse.stage_manifest import versions

_REUSED = (
    "Reused: the stage was already complete from an earlier start of this run; its figures are "
    "from when it ran."
)


@dataclass(frozen=True)
class RunFacts:
    """The facts about a run of any kind.

    title: the run's name. created: date and time as text. recipe: the resolved recipe as plain
    data. teacher: a one-line description. stages: all finished stages.
    """

    title: str
    created: str
    recipe: Mapping[str, Any]
    teacher: str
    stages: Sequence[Stage]
    machine: Mapping[str, Any]
    versions: Mapping[str, str]

    def cost(self, stage: str) -> Cost | None:
        """The cost of the last stage with this name."""
        return {one.name: one.cost for one in self.stages}.get(stage)

    @classmethod
    def gather(cls, recipe: BaseModel, teacher: str, finished: Iterable[Stage]) -> RunFacts:
        """Gather the facts about a run on this machine that ends now."""
        data = recipe.model_dump(mode="json")
        return cls(
            title=data["name"],
            created=time.strftime("%Y-%m-%d %H:%M"),
            recipe=data,
            teacher=teacher,
            stages=list(finished),
            machine=machine(),
            versions=versions(),
        )


def cost_section(stages: Sequence[Stage], *parts: Section) -> Section:
    """Build the section with each stage's tokens, FLOPs, time, and peak memory."""
    return Section(
        "Cost",
        "cost",
        table=_stage_table(stages),
        small=_REUSED if any(stage.reused for stage in stages) else "",
        charts=stage_charts(stages),
        parts=filled(*parts),
    )


def _stage_table(stages: Sequence[Stage]) -> MetricsTable:
    rows = [_cost_row(_stage_name(stage), stage.cost) for stage in stages]
    peaks = [stage.cost.peak_memory_bytes for stage in stages]
    for row, peak, before in zip(rows, peaks, [0, *accumulate(peaks, max)], strict=False):
        if peak and peak == before:  # the process's peak, which an earlier stage reached
            row[-1] = f"≤ {row[-1]}"
    total = Cost(
        sum(stage.cost.seconds for stage in stages),
        sum(stage.cost.tokens for stage in stages),
        sum(stage.cost.flops for stage in stages),
        max(peaks),
    )
    heads = ["Stage", "Tokens", "FLOPs", "Time", "Peak memory"]
    return MetricsTable.of_text(heads, rows, _cost_row("Complete run", total))


def _stage_name(stage: Stage) -> str:
    return f"{stage.name} (reused)" if stage.reused else stage.name


def _cost_row(name: str, cost: Cost) -> list[str]:
    """Format a row, with a dash for values that were not measured or do not apply."""
    tokens, memory = cost.tokens, cost.peak_memory_bytes
    return [
        name,
        text.count(tokens) if tokens else text.DASH,
        text.flops(cost.flops),
        text.seconds(cost.seconds),
        text.size(memory) if memory else text.DASH,
    ]


def stage_charts(stages: Sequence[Stage]) -> list[Chart]:
    """Chart each stage's seconds, and its FLOPs if any stage has some."""
    seconds = [stage.cost.seconds for stage in stages]
    flops = [stage.cost.flops for stage in stages]
    measures = [("Time by stage", "seconds", seconds, map(text.seconds, seconds))]
    if any(flops):
        values, label = in_powers(flops, "floating-point operations")
        measures.append(("Computation by stage", label, values, map(text.flops, flops)))
    charts: list[Chart] = []
    for title, label, values, shown in measures:
        bars = [
            Bar(_stage_name(stage), value, words, PALE if stage.reused else ACCENT)
            for stage, value, words in zip(stages, values, shown, strict=True)
        ]
        charts.append(BarChart(title, label, bars))
    return charts


def generations_section(generations: Iterable[Generation]) -> Section:
    """Build the section with every model's answers to the same prompts, by role or member name."""
    texts = [
        SideBySide(
            one.prompt,
            [
                Answer(role_name(role), one.answers[role], role_color(role))
                for role in sorted(one.answers, key=role_order)
            ],
        )
        for one in generations
    ]
    lead = "Every model’s unedited answers to the same prompts, with the same decoding settings."
    return Section("Side by side", "generations", lead=lead, texts=texts)


def notes_section(*notes: Iterable[str]) -> Section:
    """Build the section of notes, listing each once."""
    items = list(dict.fromkeys(note for some in notes for note in some))
    return Section("Notes", "notes", items=items)


def _reproduction_section(run: RunFacts) -> Section:
    recipe = yaml.safe_dump(dict(run.recipe), sort_keys=False, allow_unicode=True, width=88)
    folded = [
        Folded("Recipe with all defaults", recipe),
        Folded("Machine", facts=plain_facts(run.machine)),
        Folded("Versions", facts=[*run.versions.items()]),
    ]
    return Section("Reproduce this run", "again", folded=folded)


def plain_facts(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Format labels and values as text; a key that ends in `_bytes` is a size."""
    facts = []
    for key, value in values.items():
        if key.endswith("_bytes") and isinstance(value, int):
            facts.append((text.label(key.removesuffix("_bytes")), text.size(value)))
        else:
            facts.append((text.label(key), text.describe(value)))
    return facts


def filled(*sections: Section) -> list[Section]:
    """Keep the sections that have something to show."""
    return [section for section in sections if not section.is_empty]


def assemble(
    kind: str,
    run: RunFacts,
    headline: str,
    *sections: Section,
    remarks: Sequence[str] = (),
    figures: Iterable[Figure] = (),
) -> Report:
    """Assemble a run's report, adding the last section of every kind: how to reproduce it."""
    return Report(
        kind=kind,
        title=run.title,
        created=run.created,
        headline=headline,
        teacher=run.teacher,
        remarks=list(remarks),
        figures=list(figures),
        sections=filled(*sections, _reproduction_section(run)),
    )

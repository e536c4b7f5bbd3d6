"""Kinds of runs: their steps in order, and everything that the commands need from them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import RenderableType

from stillhouse.finding import Finding
from stillhouse.pipeline.stage_plan import Do
from stillhouse.runfolder import RunFolder, Stage, StagePlan

Rows = Iterator[dict[str, Any]]
ALL = ("*",)
"""In `Step.reads`: all finished stages, as one dictionary keyed by name."""
Link = tuple[str, str]
"""A step and a path in its stage."""


@dataclass
class Check:
    """The check of a recipe before anything is spent.

    job: the recipe with its models located. calls: the number of requests to send to estimate the
    cost of the rest. found: values that one step's check passes to later checks.
    """

    path: Path
    job: Any
    calls: int = 0
    found: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Step:
    """One stage of a kind of run.

    plan: builds the stage's plan from the job and the stages named in `reads` (None for a stage
    that did not run). applies: whether this job includes the step. then: returns the job that later
    steps see, from the job, the finished stages, and a function that runs more stages.
    main_process: whether a torchrun's other processes neither take part nor wait. require: checks
    what must hold before any step starts; it is cheap, raises StillhouseError, and yields warnings.
    check: yields further findings before the run. spending: describes what the step would spend
    without a limit. purpose: a few words on what the step does, shown when it starts.
    """

    name: str
    plan: Callable[..., StagePlan]
    reads: tuple[str, ...] = ()
    applies: Callable[[Any], bool] = lambda job: True
    then: Callable[[Any, Mapping[str, Stage], Do], Any] | None = None
    main_process: bool = False
    require: Callable[[Any], Iterable[Finding]] | None = None
    check: Callable[[Check], Iterable[Finding]] | None = None
    spending: Callable[[Any], Iterable[str]] | None = None
    purpose: str = ""


@dataclass(frozen=True)
class Kind:
    """A kind of run.

    find: locates and checks a recipe's models, and returns the job. find_to_check: does the same
    before anything is spent, without Hub models' weights. links: maps names in the run folder to
    the steps, and the paths in their stages, that they link to. load_evaluation: reads what the
    `evaluate` step wrote. preview: renders the first rows before a run. predictor: returns a
    function from texts to the predictions of the model in a folder, or None if there is no such
    model. lead, follow: run the recipe in the main process and in the others, if not as steps in
    order. expected_seconds: estimates the time of a job's stages from the names of those that apply
    and from the finished stages; empty while it is unknown.
    """

    name: str
    find: Callable[..., Any]
    find_to_check: Callable[[Any, Path], Any]
    steps: tuple[Step, ...]
    links: Callable[[Any], dict[str, Link]]
    load_evaluation: Callable[[Path], Any]
    preview: Callable[[Any, Path, int], RenderableType]
    predictor: Callable[[Path], Callable[[Iterable[str]], Rows] | None] | None = None
    lead: Callable[[Any, Path, RunFolder], RunResult] | None = None
    follow: Callable[[Any, Path, RunFolder], None] | None = None
    expected_seconds: (
        Callable[[Any, Sequence[str], Sequence[Stage]], Mapping[str, float]] | None
    ) = None


@dataclass(frozen=True)
class RunResult:
    """The products of a run.

    model: the folder of the first exported format; for a family, the smallest member's. evaluation:
    its type depends on the kind of run. members: a family's members by name, largest first.
    """

    kind: str
    folder: Path
    model: Path
    report: Path
    evaluation: Any
    stages: list[Stage]
    members: dict[str, RunResult] = field(default_factory=dict)

    def stage(self, name: str) -> Stage:
        """The stage with this name. Raises KeyError if the run has none."""
        for stage in self.stages:
            if stage.name == name:
                return stage
        raise KeyError(name)

"""A kind of run: its recipe's type, its stages in order, and what the commands need from it."""

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
"""In `Step.reads`: all finished stages, as one dictionary by name."""
Link = tuple[str, str]
"""A step, and a path in its stage."""


@dataclass
class Check:
    """The check of a recipe before anything is spent.

    job: the recipe's resolved models. calls: requests that may be sent to estimate what the others
    cost. found: values that the check of one step passes to later ones.
    """

    path: Path
    job: Any
    calls: int = 0
    found: dict[str, Any] = field(default_factory=dict)


def _always(_job: Any) -> bool:
    return True


@dataclass(frozen=True)
class Step:
    """One stage of a kind of run.

    plan: built from the job and the stages named in `reads`; None for a stage that did not run.
    applies: whether this job has the step. then: from the job, the finished stages and
    a way to run others, the job that later steps see. main_process: other
    processes of a torchrun neither take part nor wait. require: what must hold before any step
    starts; it is cheap, raises StillhouseError, and yields warnings. check: further findings
    before the run. spending: what it would spend without a limit, as text. purpose: what it does
    and why, in a few words: shown when it starts.
    """

    name: str
    plan: Callable[..., StagePlan]
    reads: tuple[str, ...] = ()
    applies: Callable[[Any], bool] = _always
    then: Callable[[Any, Mapping[str, Stage], Do], Any] | None = None
    main_process: bool = False
    require: Callable[[Any], Iterable[Finding]] | None = None
    check: Callable[[Check], Iterable[Finding]] | None = None
    spending: Callable[[Any], Iterable[str]] | None = None
    purpose: str = ""


@dataclass(frozen=True)
class Kind:
    """A kind of run.

    find: resolves and checks the models of a recipe, and returns the job. find_to_check: the same
    before anything is spent, without the weights of Hub models. links: names in the run folder, and
    the steps and paths in their stages that they point to. load_evaluation: reads what the step
    `evaluate` wrote. preview: the first rows, before a run. predictor: returns a function from
    texts to the predictions of the model in a folder; None if there is no such model. lead, follow:
    how the main process and the others run it, if not as steps in order. expected_seconds: of a
    job's stages, by the names of those that apply and the finished ones; empty while they are not
    known.
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

    model: the folder of the first format that is exported; of a family, the smallest member's.
    evaluation: of the type of its kind of run. members: of a family, by name, largest first.
    """

    kind: str
    folder: Path
    model: Path
    report: Path
    evaluation: Any
    stages: list[Stage]
    members: dict[str, RunResult] = field(default_factory=dict)

    def stage(self, name: str) -> Stage:
        return next(stage for stage in self.stages if stage.name == name)

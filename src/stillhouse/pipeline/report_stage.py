"""The stage that writes the report of any kind of run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from pydantic import BaseModel

from stillhouse.pipeline.kind import ALL, Step
from stillhouse.report.page import REPORT as REPORT
from stillhouse.report.page import Report, write_report
from stillhouse.runfolder import Outcome, Stage, StagePlan


def plan_report(
    recipe: BaseModel, stages: Mapping[str, Stage], collect: Callable[[], Report], version: int = 1
) -> StagePlan:
    """Plan the stage that writes the report built by `collect`: the page, and its data as JSON.

    stages: all finished stages, by name.
    """

    def work(out: Path) -> Outcome:
        write_report(collect(), out / REPORT)
        return Outcome()

    inputs = {
        "recipe": recipe.model_dump(mode="json"),
        "stages": {name: stage.digest for name, stage in stages.items()},
    }
    return StagePlan("report", inputs, work, version=version)


def report_step(plan: Callable[..., StagePlan]) -> Step:
    """The last step of a run, which reads all other stages."""
    purpose = "write the page with all measurements"
    return Step("report", plan, ALL, main_process=True, purpose=purpose)

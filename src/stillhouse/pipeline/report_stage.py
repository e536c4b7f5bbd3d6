"""The stage that writes a run's report, of whatever kind the run is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol, TypeVar

from pydantic import BaseModel

from stillhouse.pipeline.stage_plan import StagePlan
from stillhouse.runfolder import Outcome, Stage

REPORT, REPORT_DATA = "report.html", "report.json"


class Reported(Protocol):
    """What a page is made of."""

    def to_json(self) -> str: ...


R = TypeVar("R", bound=Reported)


def plan_report(
    recipe: BaseModel,
    stages: Mapping[str, Stage],
    collect: Callable[[], R],
    write: Callable[[R, Path], None],
    version: int = 1,
) -> StagePlan:
    """Writes the data that `collect` gives as JSON, and as the page that `write` makes of it.

    stages: all that are finished, by name.
    """

    def work(out: Path) -> Outcome:
        found = collect()
        (out / REPORT_DATA).write_text(found.to_json(), encoding="utf-8")
        write(found, out / REPORT)
        return Outcome()

    inputs = {
        "recipe": recipe.model_dump(mode="json"),
        "stages": {name: stage.digest for name, stage in stages.items()},
    }
    return StagePlan("report", inputs, work, version=version)

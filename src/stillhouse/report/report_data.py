"""Everything the report shows, as plain data that lives in one JSON file."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from stillhouse.errors import RunError
from stillhouse.evaluate.results import Evaluation
from stillhouse.runfolder import Stage


@dataclass(frozen=True)
class StageCost:
    """What one stage of the run took.

    seconds: wall clock. tokens: that passed through a model, 0 where none did. flops: by the rules
    of `stillhouse.account`, 0 where nothing was multiplied. peak_memory_bytes: of the process, None
    where it was not measured. reused: the stage was found complete, and the figures are those of
    the run that did it.
    """

    name: str
    seconds: float
    tokens: int = 0
    flops: int = 0
    peak_memory_bytes: int | None = None
    reused: bool = False

    @classmethod
    def of(cls, stage: Stage) -> StageCost:
        cost = stage.cost
        memory = cost.peak_memory_bytes or None
        return cls(stage.name, cost.seconds, cost.tokens, cost.flops, memory, stage.reused)


@dataclass(frozen=True)
class ScratchCost:
    """FLOPs on the same `tokens`: of the distillation, and of plain training from scratch.

    distillation_flops: (6 Ps + 2 Pt) a token; scratch_flops: 6 Ps a token, with Ps and Pt the
    student's and teacher's parameters, embeddings counted once (`stillhouse.account`).
    """

    tokens: int
    distillation_flops: int
    scratch_flops: int


@dataclass(frozen=True)
class ReportData:
    """The content of one report. A part that is empty or None hides its section.

    title: the run's name. created: date and time as text, shown as it is. recipe: resolved, as
    plain data. teacher: one line of text. history: rows of metrics.jsonl, training rows with
    `step`, `tokens` and `loss`, held-out rows with `step` and `heldout_kl`. student: how the
    student was made (`stillhouse.students.build_student`); its `notes` join the page's. replays:
    each export's comparison with its source (`stillhouse.export.ReplayResult` as a dictionary).
    """

    title: str
    created: str
    recipe: dict[str, Any]
    teacher: str = ""
    evaluation: Evaluation | None = None
    history: list[dict[str, Any]] = field(default_factory=list)
    stages: list[StageCost] = field(default_factory=list)
    student: dict[str, Any] = field(default_factory=dict)
    scratch: ScratchCost | None = None
    replays: list[dict[str, Any]] = field(default_factory=list)
    machine: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> ReportData:
        """The inverse of `to_json`. Raises RunError where the text is not a report's data."""
        try:
            raw = json.loads(text)
            parts = {
                "evaluation": raw["evaluation"] and Evaluation.from_dict(raw["evaluation"]),
                "stages": [StageCost(**stage) for stage in raw["stages"]],
                "scratch": raw["scratch"] and ScratchCost(**raw["scratch"]),
            }
            return cls(**{**raw, **parts})
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise RunError(
                f"this is not the data of a report: {error}",
                fix="run the report stage again: it gathers the data from the other stages",
            ) from error

    @classmethod
    def load(cls, path: Path) -> ReportData:
        """Reads the JSON file. Raises RunError where it is missing or damaged."""
        try:
            return cls.from_json(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise RunError(
                f"the report's data cannot be read: {error.strerror}",
                where=path,
                fix="check the path and its permissions, or run the report stage again",
            ) from error

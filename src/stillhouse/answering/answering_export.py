"""What an answering run ends with: a plain checkpoint with its prompt, and its report."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from stillhouse.answering.answer_stages import TEXTS, AnswerTexts
from stillhouse.answering.answering_job import AnsweringJob, filled
from stillhouse.errors import ModelError
from stillhouse.evaluate.answers import AnswersEvaluation
from stillhouse.export.checkpoint import export_checkpoint
from stillhouse.export.gate import Gate, ReplayResult
from stillhouse.export.model_card import replay_sentence
from stillhouse.export.task_card import TaskCard, write_task_card
from stillhouse.generation.chat_frame import Frame, user_turn
from stillhouse.generation.request import Message
from stillhouse.hardware import machine, peak_memory_bytes
from stillhouse.language_model.data_stage import open_data
from stillhouse.pipeline.engine import EVALUATION
from stillhouse.pipeline.report_stage import plan_report
from stillhouse.pipeline.stage_plan import StagePlan
from stillhouse.report.answers_page import (
    AnswersReport,
    answer_measures,
    write_answers_report,
)
from stillhouse.report.palette import role_name
from stillhouse.report.report_data import StageCost
from stillhouse.runfolder import Outcome, Stage, versions, write_atomically
from stillhouse.section import recipe_yaml
from stillhouse.training.checkpoints import read_metrics
from stillhouse.training.train import METRICS, MODEL

FACTS = "answering.json"
_REPLAYED = 2


@dataclass(frozen=True)
class AnsweringFacts:
    """What it takes to ask the student. examples: pairs of a user's turn and its answer.
    json_schema: of a valid answer, None for free text."""

    kind: str
    prompt: str
    system: str | None
    examples: list[list[str]]
    max_tokens: int
    json_schema: dict[str, Any] | None

    @classmethod
    def of(cls, job: AnsweringJob) -> AnsweringFacts:
        task, frame = job.recipe.task, job.frame
        return cls(
            kind=task.kind,
            prompt=task.prompt,
            system=None if task.student_sees == "prompt" else task.system,
            examples=[list(one) for one in frame.examples] if task.student_sees == "all" else [],
            max_tokens=job.recipe.teacher.sampling.max_tokens,
            json_schema=job.schema,
        )

    def messages(self, text: str) -> tuple[Message, ...]:
        question = filled(self.prompt, text)
        examples = tuple((prompt, answer) for prompt, answer in self.examples)
        frame = Frame(self.system, examples, "all")
        return frame.teacher_sees(user_turn(question))

    def save(self, folder: Path) -> None:
        write_atomically(folder / FACTS, json.dumps(asdict(self), ensure_ascii=False, indent=2))

    @classmethod
    def load(cls, folder: Path) -> AnsweringFacts:
        """Raises ModelError."""
        try:
            return cls(**json.loads((folder / FACTS).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise ModelError(
                f"this folder holds no student that answers ({error})",
                where=folder / FACTS,
                fix="give a run folder of a recipe with `task`, or its model",
            ) from None


def plan_answers_export(
    job: AnsweringJob, texts: Stage, data: Stage, trained: Stage, evaluated: Stage
) -> StagePlan:
    """A plain checkpoint, loaded by transformers alone and compared with its source; its prompt and
    card beside the weights."""
    recipe = job.recipe

    def work(out: Path) -> Outcome:
        _, heldout = open_data(data)
        some = AnswerTexts.load(texts.path / TEXTS).test[:_REPLAYED]
        prompts = [job.question(row.text) for row in some]
        code = recipe.teacher.trust_remote_code
        gate = Gate(trained.path / MODEL, heldout, prompts, recipe.seed, None, code)
        replay = export_checkpoint(gate, out / MODEL, dtype=recipe.export.dtype)
        AnsweringFacts.of(job).save(out / MODEL)
        found = AnswersEvaluation.load(evaluated.path / EVALUATION)
        _write_card(out / MODEL, job, texts, trained, found, replay)
        return Outcome(summary={"replays": [asdict(replay)]}, peak_memory_bytes=peak_memory_bytes())

    inputs = {
        "recipe": recipe.model_dump(mode="json", include={"name", "task", "export"}),
        "schema": job.schema,
        "teacher": job.described,
        "origins": [asdict(one) for one in job.made_with],
        "texts": texts.digest,
        "data": data.digest,
        "trained": trained.digest,
        "evaluated": evaluated.digest,
    }
    return StagePlan("export", inputs, work, version=2)


def _write_card(
    folder: Path,
    job: AnsweringJob,
    texts: Stage,
    trained: Stage,
    found: AnswersEvaluation,
    replay: ReplayResult,
) -> None:
    recipe, parts = job.recipe, texts.summary
    files = ", ".join(file.path for file in [*recipe.data.texts, *recipe.data.test])
    hashes = {"texts": texts.digest, "checkpoint": trained.digest}
    if job.teacher is not None:
        hashes = {"teacher": job.teacher.fingerprint, **hashes}
    card = TaskCard(
        name=recipe.name,
        pipeline="text-generation",
        origins=job.made_with,
        about=[
            f"A language model for one job ({found.kind}), distilled from {job.described} with "
            "Stillhouse."
        ],
        models=[role_name(result.role) for result in found.results],
        measures=answer_measures(found),
        texts=found.texts,
        data=f"{parts['train']:,} training texts and {parts['test']:,} to measure on, from {files}",
        recipe=recipe_yaml(recipe),
        hashes=hashes,
        limits=["It was measured on this one job, asked with this one prompt.", *found.notes],
    )
    use = (
        "`stillhouse predict FOLDER texts.jsonl` writes an answer for each text. Its prompt is in "
        f"`{FACTS}`."
    )
    write_task_card(folder, card, library="transformers", use=use, replay=replay_sentence(replay))


def plan_answers_report(job: AnsweringJob, stages: dict[str, Stage]) -> StagePlan:
    def collect() -> AnswersReport:
        return AnswersReport(
            title=job.recipe.name,
            created=time.strftime("%Y-%m-%d %H:%M"),
            teacher=job.described,
            evaluation=AnswersEvaluation.load(stages["evaluate"].path / EVALUATION),
            parts={part: stages["texts"].summary[part] for part in ("train", "test")},
            answers=stages["answers"].summary,
            metrics=read_metrics(stages["train"].path / METRICS),
            stages=[StageCost.of(stage) for stage in stages.values()],
            recipe=job.recipe.model_dump(mode="json"),
            machine=machine(),
            versions=versions(),
        )

    return plan_report(job.recipe, stages, collect, write_answers_report)

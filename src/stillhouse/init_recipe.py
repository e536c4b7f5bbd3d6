"""`stillhouse init`: a commented recipe, and the files that it reads."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stillhouse.config.load import recipe_from_text
from stillhouse.errors import DataError, RecipeError, RunError
from stillhouse.init_answers import CORPUS, JOBS, SIZES, Wishes
from stillhouse.runfolder import write_atomically
from stillhouse.teachers.load import load_config
from stillhouse.teachers.model_source import resolve_model

_CLASSIFIER_LAYERS = {"small": 4, "medium": 6, "large": 10}


@dataclass(frozen=True)
class Draft:
    """text: of the recipe. files: others that it reads, by their path."""

    text: str
    files: dict[Path, str] = field(default_factory=dict)


def write_draft(wish: Wishes, *, force: bool = False) -> list[Path]:
    """Writes the recipe and what it reads; all paths. Raises RunError where one exists already
    (unless forced), ModelError about the teacher, RecipeError about the wishes; nothing is written
    then."""
    draft = drafted(wish)
    recipe_from_text(draft.text, wish.out)
    files = {wish.out: draft.text, **draft.files}
    for path in files:
        if path.exists() and not force:
            raise RunError(
                "the file exists already", where=path, fix="give another --out, or --force"
            )
    for path, text in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, text)
    return list(files)


def drafted(wish: Wishes) -> Draft:
    """Raises RecipeError for wishes that do not fit together."""
    if wish.job == "distill":
        return _distill(wish)
    if wish.data == CORPUS:
        raise RecipeError(
            f"{CORPUS} is text to distill on, and no list of texts for a task",
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
    source = "{kind: corpus}"
    if wish.data != CORPUS:
        source = f"{{kind: file, path: {_path(wish, wish.data)}}}"
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

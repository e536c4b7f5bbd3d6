"""`stillhouse init`: writes a commented recipe from a template, and the files that it reads."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from jinja2 import Environment, PackageLoader, StrictUndefined

from stillhouse.config.load_recipe import recipe_from_text
from stillhouse.data.data_files import text_size
from stillhouse.data.file_search import find_files
from stillhouse.errors import DataError, ModelError, RecipeError, RunError
from stillhouse.init_amounts import (
    LEAST_TRAINED,
    SENSIBLE_TOKENS,
    Kept,
    amounts,
    pruned_sizes,
    trained_tokens,
    training_seconds,
    unlimited,
)
from stillhouse.init_answers import JOBS, SIZES, InitAnswers
from stillhouse.init_sources import CORPUS, first_questions, has_chats
from stillhouse.language_model.package_check import CHARACTERS_PER_TOKEN
from stillhouse.number_format import seconds
from stillhouse.planning.machine import Machine, this_machine
from stillhouse.planning.model_size import ModelSize, config_size
from stillhouse.progress import note
from stillhouse.runfolder import write_atomically
from stillhouse.teachers.load_model import load_config
from stillhouse.teachers.model_source import resolve_model

_CLASSIFIER_LAYERS = {"small": 4, "medium": 6, "large": 10}
_TEMPLATES = {"distill": "distill", "classify": "classify"}
_MOST_HELDOUT, _HELDOUT_SHARE, _HELDOUT_STEP = 8192, 0.1, 256
"""Held-out tokens of a training text: at most, as a share of the text, and in multiples of."""
_CORPUS_TOKENS = 110_000
"""Of the text that is included."""
_PROMPTS = (
    "What is the capital of France?",
    "Explain in two sentences why the sky is blue.",
)
_QUESTIONS = 2
"""Questions of the user's own chats that are answered in the report."""
_KEYS = {
    "api.openai.com": "OPENAI_API_KEY",
    "openrouter.ai": "OPENROUTER_API_KEY",
    "api.together.xyz": "TOGETHER_API_KEY",
    "api.groq.com": "GROQ_API_KEY",
    "api.mistral.ai": "MISTRAL_API_KEY",
    "api.deepseek.com": "DEEPSEEK_API_KEY",
    "api.fireworks.ai": "FIREWORKS_API_KEY",
    "generativelanguage.googleapis.com": "GEMINI_API_KEY",
}
"""The environment variables that hold the keys of APIs, by host, as their documentation names
them."""


def write_recipe(answers: InitAnswers, *, force: bool = False) -> list[Path]:
    """Write the recipe and the files that it reads; return their paths.

    Raises RunError if a file already exists (unless forced), ModelError about the teacher,
    RecipeError and DataError about invalid answers; nothing is written in these cases.
    """
    _check(answers)
    files = _files(answers)
    text = _rendered(answers, files)
    recipe_from_text(text, answers.out)
    contents = {answers.out: text, **dict(files.values())}
    for path in contents:
        if path.exists() and not force:
            raise RunError(
                "the file exists already", where=path, fix="pass another --out or --force"
            )
    for path, content in contents.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, content)
    return list(contents)


def _check(answers: InitAnswers) -> None:
    if answers.is_api and answers.job == "distill":
        raise RecipeError(
            "an API does not return distributions over all tokens",
            where="--teacher",
            fix="give a model, or use --job generate, which trains on the API's text",
        )
    if answers.is_api and answers.size in SIZES:
        raise RecipeError(
            "an API's model cannot be made smaller",
            where="--size",
            fix="name a model for the student to start from, such as a small instruct model",
        )
    if answers.job != "distill" and answers.data == CORPUS:
        raise RecipeError(
            f"{CORPUS} is text to distill on, not a list of texts for a task",
            where="--data",
            fix="give a file with one text per row",
        )
    if answers.job == "classify" and not answers.labels and answers.label_key is None:
        raise RecipeError(
            "a classifier needs labels", where="--labels", fix="pass them: --labels news,sports"
        )


def _files(answers: InitAnswers) -> dict[str, tuple[Path, str]]:
    """The files next to the recipe, by purpose: path and content."""
    files = {}
    if answers.logs is not None and answers.job != "distill":
        path = answers.out.with_name(f"{answers.name}-texts.jsonl")
        files["texts"] = path, answers.logs.rows(answers.job)
    if answers.job == "extract":
        path = answers.out.with_name(f"{answers.name}.schema.json")
        files["schema"] = path, json.dumps(_schema(answers), indent=2, ensure_ascii=False)
    return files


def _rendered(answers: InitAnswers, files: Mapping[str, tuple[Path, str]]) -> str:
    def path(value: str | Path) -> str:
        """A file or folder relative to the recipe's folder; other names are unchanged."""
        file = Path(value).expanduser()
        named = [answers.data, *(source.get("path") for source in answers.sources)]
        known = isinstance(value, Path) or file.exists() or value in named
        if not known or file.is_absolute():
            return _json(str(file) if known else value)
        return _json(os.path.relpath(file, answers.out.parent))

    environment = Environment(
        loader=PackageLoader("stillhouse", "templates"),
        undefined=StrictUndefined,
        keep_trailing_newline=True,
        autoescape=False,  # YAML, not HTML
    )
    environment.filters |= {"json": _json, "path": path}
    environment.globals["jobs"] = JOBS
    template = _TEMPLATES.get(answers.job, "answering")
    return environment.get_template(f"{template}.yaml.j2").render(
        job=answers.job,
        out=answers.out,
        name=answers.name,
        teacher=answers.teacher,
        api_model=answers.api_model if answers.is_api else None,
        key_env=_KEYS.get(urlsplit(answers.teacher).hostname or "") if answers.is_api else None,
        data=answers.data,
        sources=answers.sources,
        texts_path=files["texts"][0] if "texts" in files else answers.data,
        schema_path=files["schema"][0] if "schema" in files else None,
        text_key=answers.text_key,
        label_key=answers.label_key,
        labels=list(answers.labels),
        system=None if answers.logs is None else answers.logs.system,
        prompt=_prompt(answers),
        prompts=[*_PROMPTS, *first_questions(answers.sources, _QUESTIONS)],
        **_sizes(answers),
    )


def _sizes(answers: InitAnswers) -> dict[str, Any]:
    """The initial student, and how much text it learns from."""
    start = None if answers.size in SIZES else answers.size
    found: dict[str, Any] = {"start": start, "layers": None, "ffn_size": None, "amounts": None}
    if start is not None and answers.job != "distill":
        return found
    tokens = _tokens(answers) if answers.job == "distill" else 0.0
    held = max(1, int(_HELDOUT_SHARE * tokens / _HELDOUT_STEP)) * _HELDOUT_STEP
    found["heldout_tokens"] = held = min(_MOST_HELDOUT, held)
    tokens = max(1.0, tokens - held)
    try:
        path = resolve_model(answers.teacher, base=Path.cwd(), weights=False).path
        config = load_config(path)
    except ModelError:
        if start is None:
            raise
        return found | {"amounts": unlimited(tokens)}  # `check` says what is wrong with it
    if start is None and answers.job == "classify":
        depth = config.get_text_config().num_hidden_layers
        return found | {"layers": Kept(min(_CLASSIFIER_LAYERS[answers.size], depth), depth)}
    teacher = config_size(config)
    student: float = teacher.active  # of another model, at most
    if start is None:
        sizes = pruned_sizes(config, SIZES[answers.size])
        student = sizes.active
        found |= {"layers": sizes.layers, "ffn_size": sizes.ffn_size}
    if answers.job == "distill":
        machine = this_machine("auto", timed=True)
        found["amounts"] = learned = amounts(tokens, teacher, student, machine)
        _note_training(answers, trained_tokens(learned, tokens), teacher, student, machine)
    return found


def _note_training(
    answers: InitAnswers, trained: float, teacher: ModelSize, student: float, machine: Machine
) -> None:
    """What the student learns from, and what it cannot learn from so little.

    trained: tokens, of all epochs. student: its active parameters.
    """
    time = training_seconds(trained, teacher, student, machine)
    shown = "" if time is None else f" takes about {seconds(time)} on this machine"
    if trained < LEAST_TRAINED:
        note(f"training on only {trained:,.0f} tokens: the text is too short to learn much from")
    else:
        note(f"training on {trained:,.0f} tokens{shown}; more tokens make a better student")
    if has_chats(answers.sources):
        note(
            "the student learns to answer questions like those in your chats, and answers others "
            "worse than the teacher: to keep other topics, add chats about them"
        )
    else:
        note(
            "this is text without questions and answers: the student learns to continue such text. "
            "To keep the teacher's ability to answer, train on chats (docs/data.md#rows)"
        )
    if SIZES.get(answers.size, 1.0) < SIZES["large"] and trained < SENSIBLE_TOKENS:
        note(
            f"a {answers.size} student needs far more text to write well: expect broken sentences. "
            "Use the size large for a first result, or raise data.train_tokens in the recipe"
        )


def _tokens(answers: InitAnswers) -> float:
    """Of the training text, estimated."""
    if answers.data == CORPUS:
        return _CORPUS_TOKENS
    paths = [source["path"] for source in answers.sources]
    files = {file for path in paths for file in find_files(path, Path.cwd())}
    return sum(map(text_size, files)) / CHARACTERS_PER_TOKEN


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _prompt(answers: InitAnswers) -> str:
    if answers.logs is not None:
        return "{text}"
    return {
        "classify": "Message: {text}\n\nWhat is the topic of this message?",
        "extract": f"Text: {{text}}\n\nWrite {', '.join(answers.fields)} of this text as JSON.",
    }.get(answers.job, "{text}")


def _schema(answers: InitAnswers) -> dict[str, Any]:
    if answers.logs is not None and answers.logs.job == "extract" and not answers.fields:
        return answers.logs.schema
    if not answers.fields:
        raise DataError(
            "an extraction needs fields", where="--fields", fix="pass them: --fields name,date"
        )
    text_or_null = {"type": ["string", "null"]}
    return {
        "type": "object",
        "properties": dict.fromkeys(answers.fields, text_or_null),
        "required": list(answers.fields),
        "additionalProperties": False,
    }

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
from stillhouse.errors import DataError, RecipeError, RunError
from stillhouse.init_answers import CORPUS, JOBS, SIZES, InitAnswers
from stillhouse.language_model.package_check import CHARACTERS_PER_TOKEN
from stillhouse.runfolder import write_atomically
from stillhouse.teachers.load_model import load_config
from stillhouse.teachers.model_source import resolve_model

_CLASSIFIER_LAYERS = {"small": 4, "medium": 6, "large": 10}
_TEMPLATES = {"distill": "distill", "classify": "classify"}
_MOST_HELDOUT, _HELDOUT_SHARE, _HELDOUT_STEP = 8192, 0.1, 256
"""Held-out tokens of a training text: at most, as a share of the text, and in multiples of."""
_SHORT = 300_000
"""Tokens of a text below which one pass has too few optimizer steps."""
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
        **_amounts(answers),
        sources=answers.sources,
        texts_path=files["texts"][0] if "texts" in files else answers.data,
        schema_path=files["schema"][0] if "schema" in files else None,
        text_key=answers.text_key,
        label_key=answers.label_key,
        labels=list(answers.labels),
        system=None if answers.logs is None else answers.logs.system,
        prompt=_prompt(answers),
        **_start(answers),
    )


def _amounts(answers: InitAnswers) -> dict[str, int]:
    """Of a training text: about a tenth is held out, and at most 8,192 tokens; a short one is
    trained on in small steps, three times."""
    if answers.job != "distill" or answers.data == CORPUS:
        return {"heldout_tokens": _MOST_HELDOUT, "batch_size": 8, "epochs": 1}
    paths = [source["path"] for source in answers.sources]
    files = {file for path in paths for file in find_files(path, Path.cwd())}
    characters = sum(map(text_size, files))
    tokens = characters / CHARACTERS_PER_TOKEN
    held = max(1, int(_HELDOUT_SHARE * tokens / _HELDOUT_STEP)) * _HELDOUT_STEP
    small = {"batch_size": 2, "epochs": 3} if tokens < _SHORT else {"batch_size": 8, "epochs": 1}
    return {"heldout_tokens": min(_MOST_HELDOUT, held), **small}


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _start(answers: InitAnswers) -> dict[str, Any]:
    """The initial student: a model, or how much of the teacher is kept."""
    if answers.size not in SIZES:
        return {"start": answers.size, "layers": None, "ffn_size": None}
    path = resolve_model(answers.teacher, base=Path.cwd(), weights=False).path
    config = load_config(path).get_text_config()
    share = SIZES[answers.size] ** 0.5  # shares of the depth and of the width
    kept = max(1, round(config.num_hidden_layers * share))
    if answers.job == "classify":
        kept = min(_CLASSIFIER_LAYERS[answers.size], config.num_hidden_layers)
    width, ffn_size = getattr(config, "intermediate_size", None), None
    if isinstance(width, int) and not hasattr(config, "num_experts"):
        ffn_size = {"kept": max(8, round(width * share / 8) * 8), "all": width}
    layers = {"kept": kept, "all": config.num_hidden_layers}
    return {"start": None, "layers": layers, "ffn_size": ffn_size}


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

"""`stillhouse init`: writes a commented recipe from a template, and the files that the recipe
reads."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from jinja2 import Environment, PackageLoader, StrictUndefined

from stillhouse import init_general
from stillhouse.atomic_files import write_atomically
from stillhouse.config.load_recipe import recipe_from_text
from stillhouse.disk_errors import disk_errors, made_folder
from stillhouse.errors import DataError, RecipeError, RunError
from stillhouse.init_answers import JOBS, SIZES, InitAnswers
from stillhouse.init_plan import planned
from stillhouse.init_sources import CORPUS, first_questions

_QUESTIONS = 2
"""How many questions from the user's own chats are answered in the report."""
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
"""The environment variables for API keys, by host, as named in each API's documentation."""


def write_recipe(answers: InitAnswers, *, force: bool = False) -> list[Path]:
    """Write the recipe and the files that it reads; return their paths.

    Raises RunError if a file already exists (unless forced), ModelError if the teacher cannot be
    used, and RecipeError or DataError if an answer is invalid. Nothing is written in these cases.
    """
    _check(answers)
    files = _files(answers)
    text = _rendered(answers, files)
    recipe_from_text(text, answers.out)
    contents = {answers.out: text, **dict(files.values())}
    for path in contents:
        if path.exists() and not force:
            raise RunError(
                "the file already exists", where=path, fix="pass a different --out, or --force"
            )
    for path, content in contents.items():
        with disk_errors(path.parent):
            made_folder(path.parent)
        write_atomically(path, content)
    return list(contents)


def _check(answers: InitAnswers) -> None:
    if answers.is_api and answers.job == "distill":
        raise RecipeError(
            "an API does not return distributions over all tokens",
            where="--teacher",
            fix="pass a model, or use --job generate, which trains on the API's text",
        )
    if answers.is_api and answers.size in SIZES:
        raise RecipeError(
            "an API's model cannot be made smaller",
            where="--size",
            fix="pass a model for the student to start from, such as a small instruct model",
        )
    if answers.job != "distill" and answers.data == CORPUS:
        raise RecipeError(
            f"{CORPUS} is text to distill on, not a list of texts for a task",
            where="--data",
            fix="pass a file with one text per row",
        )
    known = answers.label_key is not None and not answers.labels
    if answers.job == "classify" and not known and len(set(answers.labels)) < 2:
        raise RecipeError(
            "a classifier needs at least two labels",
            where="--labels",
            fix="pass them: --labels news,sports",
        )


def _files(answers: InitAnswers) -> dict[str, tuple[Path, str]]:
    """The path and content of each file next to the recipe, by purpose."""
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
        """Make a file or folder relative to the recipe's folder; leave other names unchanged."""
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
    environment.globals |= {"jobs": JOBS, "general_chats": init_general}
    template = answers.job if answers.job in ("distill", "classify") else "answering"
    return environment.get_template(f"{template}.yaml.j2").render(
        answers=answers,
        key_env=_KEYS.get(urlsplit(answers.teacher).hostname or "") if answers.is_api else None,
        texts_path=files["texts"][0] if "texts" in files else answers.data,
        schema_path=files["schema"][0] if "schema" in files else None,
        questions=first_questions(answers.sources, _QUESTIONS),
        **planned(answers),
    )


def _json(value: Any) -> str:
    """Serialize a value as JSON that is also YAML, where more characters must be escaped or count
    as line breaks."""
    text = json.dumps(value, ensure_ascii=False)
    return re.sub("[\x7f-\x9f\u2028\u2029\ufffe\uffff]", lambda c: f"\\u{ord(c[0]):04x}", text)


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

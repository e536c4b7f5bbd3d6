"""A JSON schema must restrict answers. It is found inside the wrappers that APIs use; a schema that
restricts nothing is rejected."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from stillhouse.check import check_recipe
from stillhouse.errors import DataError, RecipeError, StillhouseError
from stillhouse.synthesis.answer_schema import read_schema
from stillhouse.synthesis.filters import Row, json_schema
from stillhouse.synthesis.patterns import compiled_pattern
from tests import tiny

pytestmark = pytest.mark.run

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string"}},
    "required": ["name"],
    "additionalProperties": False,
}
FORMS: dict[str, Any] = {
    "OpenAI's json_schema": {"name": "contact", "strict": True, "schema": SCHEMA},
    "OpenAI's response_format": {
        "type": "json_schema",
        "json_schema": {"name": "contact", "strict": True, "schema": SCHEMA},
    },
    "a request's response_format": {
        "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}
    },
    "the Responses API's format": {
        "format": {"type": "json_schema", "name": "contact", "schema": SCHEMA}
    },
    "OpenAI's tool": {
        "type": "function",
        "function": {"name": "contact", "strict": True, "parameters": SCHEMA},
    },
    "the Responses API's tool": {"type": "function", "name": "contact", "parameters": SCHEMA},
    "Anthropic's tool": {"name": "contact", "description": "A contact.", "input_schema": SCHEMA},
    "MCP's tool": {"name": "contact", "inputSchema": SCHEMA},
    "Bedrock's tool": {"toolSpec": {"name": "contact", "inputSchema": {"json": SCHEMA}}},
    "the schema itself": SCHEMA,
    "by reference": {"$ref": "#/$defs/Contact", "$defs": {"Contact": SCHEMA}},
}


def written(folder: Path, raw: Any) -> Path:
    file = folder / "contact.schema.json"
    file.write_text(raw if isinstance(raw, str) else json.dumps(raw))
    return file


def recipe_with_filters(folder: Path, filters: dict[str, str]) -> dict[str, Any]:
    recipe = tiny.recipe(folder)
    (folder / "prompts.txt").write_text("Name a person.\n")
    recipe["synthesize"] = {
        "teacher": {"local": {}},
        "prompts": {"path": str(folder / "prompts.txt")},
        "filters": filters,
        "out": str(folder / "out.jsonl"),
    }
    return recipe


@pytest.mark.parametrize("form", FORMS)
def test_the_schema_is_found_in_every_form(tmp_path: Path, form: str) -> None:
    judge = json_schema(read_schema(written(tmp_path, FORMS[form])))
    allowed = [text for text in ('{"name": "Ann"}', '{"x": 1}', "[]", '"hello"', "{}")
               if judge(Row((), text, None, "")) is None]  # fmt: skip
    assert allowed == ['{"name": "Ann"}']


@pytest.mark.parametrize(
    ("raw", "advice"),
    [
        ({"name": "string", "age": "integer"}, '"properties"'),
        ({"properties": {"name": {"type": "string"}}}, '"type": "object", and "required"'),
        ({"$defs": {"Contact": SCHEMA}}, '"$ref": "#/$defs/Contact"'),
        ({"definitions": {"Contact": SCHEMA}}, '"$ref": "#/definitions/Contact"'),
        ({"name": "contact", "strict": True, "schema": {}}, '"required"'),
        ({"$schema": "https://json-schema.org/draft/2020-12/schema"}, '"required"'),
        ({"description": "A contact: name and age."}, '"required"'),
        ({}, '"required"'),
        ("true", '"required"'),
        ([SCHEMA], '"required"'),
    ],
)
def test_a_schema_that_restricts_nothing_is_rejected(tmp_path: Path, raw: Any, advice: str) -> None:
    with pytest.raises(DataError) as caught:
        read_schema(written(tmp_path, raw))
    assert advice in str(caught.value.fix)


@pytest.mark.parametrize(
    "raw",
    [
        {"type": "object", "properties": {}},
        {"type": "array", "items": {"type": "string"}},
        {"enum": ["yes", "no"]},
        {"anyOf": [{"type": "object"}, {"type": "null"}]},
        {"required": ["name"], "type": "object"},
    ],
)
def test_a_schema_that_restricts_little_is_accepted(tmp_path: Path, raw: Any) -> None:
    assert read_schema(written(tmp_path, raw)) == raw


@pytest.mark.parametrize(
    ("raw", "what"),
    [
        ({"$ref": "#"}, "refers to itself infinitely"),
        ({"type": "string", "pattern": "(a|aa)+$"}, "takes more than"),
        ({"type": "object", "properties": {"a": {"pattern": "("}}}, "regex"),
        ({"type": "object", "patternProperties": {"(x|x)*$": {}}}, "takes more than"),
        ("[" * 100_000 + "]" * 100_000, "cannot be read"),
    ],
)
def test_schemas_that_cannot_be_checked_are_rejected(tmp_path: Path, raw: Any, what: str) -> None:
    with pytest.raises(StillhouseError, match=what):
        json_schema(read_schema(written(tmp_path, raw)))


def test_the_patterns_in_a_schema_restrict_answers() -> None:
    schema = {"type": "object", "properties": {"a": {"pattern": "^x"}}, "patternProperties": {
        "^n_": {"type": "integer"}}}  # fmt: skip
    judge = json_schema(schema)
    said = {text: judge(Row((), text, None, "")) is None for text in
            ('{"a": "xy"}', '{"a": "yx"}', '{"n_1": 3}', '{"n_1": "3"}')}  # fmt: skip
    assert list(said.values()) == [True, False, True, False]


@pytest.mark.parametrize("raw", [{"name": "string", "age": "integer"}, True])
def test_check_rejects_a_schema_that_restricts_nothing(tmp_path: Path, raw: Any) -> None:
    recipe = recipe_with_filters(tmp_path, {"json_schema": str(written(tmp_path, raw))})
    last = check_recipe(recipe)[-1]
    assert last.level == "error"
    assert "JSON schema" in last.text


@pytest.mark.parametrize("key", ["require_pattern", "forbid_pattern"])
@pytest.mark.parametrize("pattern", ["(", "[z-a]", "(a|a)*$", "(0|00)+$"])
def test_check_rejects_patterns_that_do_not_compile_or_run_away(
    tmp_path: Path, key: str, pattern: str
) -> None:
    last = check_recipe(recipe_with_filters(tmp_path, {key: pattern}))[-1]
    assert last.level == "error"
    assert "regular expression" in last.text


@pytest.mark.parametrize("pattern", ["(a+)+$", "([a-z]+)*[0-9]", "^(a*)*$", "(.*a){20}$"])
def test_patterns_that_hang_pythons_re_finish_at_once(pattern: str) -> None:
    assert compiled_pattern(pattern, "filters.require_pattern").search("a" * 60 + "\0") is None


def test_a_pattern_that_runs_away_only_on_an_answer_is_an_error() -> None:
    found = compiled_pattern("^label: (x|xx)+y$", "filters.require_pattern")
    assert found.search("label: xxxy") is not None
    with pytest.raises(RecipeError, match="answers that arrived are kept"):
        found.search("label: " + "x" * 200)

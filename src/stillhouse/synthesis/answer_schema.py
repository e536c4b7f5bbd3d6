"""Reads and checks the JSON schema of answers, with or without an API's wrapper around it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
from jsonschema_specifications import REGISTRY
from referencing import Resource
from referencing.exceptions import Unresolvable
from referencing.jsonschema import DRAFT202012

from stillhouse.data.clear_json import value_at
from stillhouse.data.data_files import regular_if_there
from stillhouse.errors import DataError, RecipeError
from stillhouse.synthesis.patterns import Pattern, compiled_pattern

TYPES = ("object", "array", "string", "number", "integer", "boolean", "null")
KEYWORDS = frozenset((
    "$ref", "$dynamicRef", "$schema", "$defs", "definitions", "properties", "patternProperties",
    "additionalProperties", "propertyNames", "required", "items", "prefixItems", "contains", "enum",
    "const", "anyOf", "oneOf", "allOf", "not", "if", "pattern", "minimum", "maximum",
    "minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties",
))  # fmt: skip
"""Keys that occur in a schema but not in its wrappers."""
_PLACES = (
    ("schema",),  # OpenAI's response_format: name, strict, schema
    ("json_schema", "schema"),
    ("response_format", "json_schema", "schema"),
    ("format", "schema"),
    ("text", "format", "schema"),
    ("parameters",),  # OpenAI's tools
    ("function", "parameters"),
    ("input_schema",),  # Anthropic's tools
    ("inputSchema", "json"),  # Bedrock's
    ("toolSpec", "inputSchema", "json"),
    ("inputSchema",),  # those of MCP
    ("response_schema",),
    ("responseSchema",),
    ("guided_json",),
)
"""Where requests to models contain a schema."""
_ANYTHING: tuple[Any, ...] = ({}, {"x": 1}, [], "hello", 0, 1.5, True, None)


def read_schema(path: Path) -> dict[str, Any]:
    """Read a JSON schema from a file, without its wrapper, if any.

    Raises DataError if it cannot be read or allows any answer.
    """
    regular_if_there(path)
    try:
        raw = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(
            f"the JSON schema cannot be read: {error}",
            where=path,
            fix="check the path and the file",
        ) from None
    schema = opened_schema(raw)
    if not isinstance(schema, dict):
        raise DataError(
            f"the JSON schema is {json.dumps(schema)[:60]}, not an object",
            where=path,
            fix='write it as an object, such as {"type": "object", "properties": {...}, '
            '"required": [...]}',
        )
    if _allows_anything(schema):
        raise DataError(
            'the JSON schema allows any answer, including {"x": 1}, [], and "hello"',
            where=path,
            fix=_how_to_restrict(schema),
        )
    return schema


def opened_schema(raw: Any) -> Any:
    """Unwrap the schema in a request's `response_format` or a tool; return anything else as is."""
    if not isinstance(raw, Mapping) or _is_schema(raw):
        return raw
    for place in _PLACES:
        found = value_at(raw, place)
        if isinstance(found, Mapping) and _is_schema(found):
            return found
    return raw


def _is_schema(raw: Mapping[str, Any]) -> bool:
    kind = raw.get("type")
    return kind in TYPES or isinstance(kind, list) or not KEYWORDS.isdisjoint(raw)


def _allows_anything(schema: dict[str, Any]) -> bool:
    """Whether the schema allows any answer; False if it is invalid, which is reported elsewhere."""
    try:
        validator = schema_validator(schema)
        return all(validator.is_valid(value) for value in _ANYTHING)
    except (RecipeError, Unresolvable):
        return False


def _how_to_restrict(schema: dict[str, Any]) -> str:
    if "properties" in schema:
        return 'add "type": "object", and "required" with the keys that an answer must have'
    for key in ("$defs", "definitions"):
        if schema.get(key):
            first = next(iter(schema[key]))
            return f'add a reference to the right definition, e.g. "$ref": "#/{key}/{first}"'
    return (
        'write {"type": "object", "properties": {"NAME": {"type": "string"}}, "required": '
        '["NAME"]}, with the names and types of your values'
    )


def schema_validator(schema: dict[str, Any], where: object = "json_schema") -> Any:
    """A jsonschema validator that also checks `format`, and whose patterns cannot hang.

    where: the schema's file. Raises RecipeError if the schema is invalid, refers to anything
    outside it, or recurses infinitely.
    """
    try:
        kind = jsonschema.validators.validator_for(schema)
    except (AttributeError, TypeError, ValueError):
        what = f"the JSON schema's $schema is not a URL: {schema.get('$schema')!r}"
        raise unusable_schema(what, where) from None
    try:
        kind.check_schema(schema)
        check_references(schema)
    except jsonschema.SchemaError as error:
        what = f"the JSON schema is not valid: {error.message[:300]}"
        raise unusable_schema(what, where) from None
    except Unresolvable as error:
        raise unresolved(error, where) from None
    except RecursionError:
        raise unusable_schema("the JSON schema is nested too deeply", where) from None
    except RecipeError as error:  # a pattern
        raise RecipeError(error.what, where=where, fix=error.fix) from None
    limited = jsonschema.validators.extend(
        kind, {"pattern": _pattern, "patternProperties": _pattern_properties}
    )
    validator = limited(schema, registry=REGISTRY, format_checker=kind.FORMAT_CHECKER)
    try:
        for value in _ANYTHING:
            validator.is_valid(value)
    except RecursionError:
        what = "the JSON schema refers to itself infinitely"
        raise unusable_schema(what, where) from None
    return validator


@cache
def _compiled(expression: str) -> Pattern:
    return compiled_pattern(expression, "json_schema")


def _pattern(_validator: Any, expression: str, value: Any, _schema: Any) -> Iterator[Any]:
    if isinstance(value, str) and _compiled(expression).search(value) is None:
        yield jsonschema.ValidationError(f"{value!r} does not match {expression!r}")


def _pattern_properties(
    validator: Any, patterns: Mapping[str, Any], value: Any, _schema: Any
) -> Iterator[Any]:
    if not isinstance(value, dict):
        return
    for expression, part in patterns.items():
        for key, inner in value.items():
            if _compiled(expression).search(key) is not None:
                yield from validator.descend(inner, part, path=key, schema_path=expression)


def check_references(schema: dict[str, Any]) -> None:
    """Raise referencing.exceptions.Unresolvable for a `$ref` that is neither in the schema nor in a
    JSON Schema specification, since nothing is downloaded. Also compiles every `pattern`."""
    resource: Resource[Any] = Resource.from_contents(schema, default_specification=DRAFT202012)
    registry: Any = REGISTRY.with_resource(resource.id() or "", resource)
    todo = [(resource, registry.resolver_with_root(resource))]
    while todo:
        part, resolver = todo.pop()
        if isinstance(part.contents, Mapping):
            if isinstance(part.contents.get("$ref"), str):
                resolver.lookup(part.contents["$ref"])
            _compile_patterns(part.contents)
        todo += [(inner, resolver.in_subresource(inner)) for inner in part.subresources()]


def _compile_patterns(part: Mapping[str, Any]) -> None:
    for expression in (part.get("pattern"), *part.get("patternProperties", {})):
        if isinstance(expression, str):
            _compiled(expression)


def unusable_schema(what: str, where: object) -> RecipeError:
    return RecipeError(what, where=where, fix="correct the schema's file")


def unresolved(error: Unresolvable, where: object) -> RecipeError:
    what = f"the JSON schema refers to {error.ref!r}, which is not in it (nothing is downloaded)"
    return unusable_schema(what, where)

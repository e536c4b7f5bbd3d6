"""A number in any section is one that a run can use, or is rejected with its key and value."""

from __future__ import annotations

import math
from typing import Any

import pytest

from stillhouse.config.load_recipe import AnyRecipe, parse_recipe
from stillhouse.errors import RecipeError, shown_value
from stillhouse.pruning.pruning_config import TargetRecipe
from tests.config.every_section import (
    changed,
    every_section,
    is_numeric,
    numeric_fields,
    recipes,
    sections,
)

NONSENSE: list[Any] = [
    True,
    False,
    "on",
    "x",
    "",
    "inf",
    "nan",
    "1_000",
    "0x10",
    math.inf,
    -math.inf,
    math.nan,
    1e308,
    -1e308,
    -1,
    -1e-9,
    1e-320,
    10**30,
    10**400,
    10**5000,
    -(10**30),
    2**63,
    2**64,
    [1],
    [],
    {},
    {"a": 1},
    None,
    b"1",
    object(),
]
FIELDS = numeric_fields()


def test_the_recipes_of_these_tests_are_valid_and_contain_every_section() -> None:
    found = set()
    for raw in recipes():
        parse_recipe(raw)
        found |= {model for _, model in sections(raw)}
    numeric = {
        model
        for model in every_section()
        if any(is_numeric(field.annotation) for field in model.model_fields.values())
    }
    assert not {model.__name__ for model in numeric - found}
    assert len(FIELDS) > 100


@pytest.mark.parametrize(("raw", "path"), [f[1:3] for f in FIELDS], ids=[f[0] for f in FIELDS])
def test_invalid_values_are_rejected_with_key_and_value(raw: dict[str, Any], path: Any) -> None:
    for value in NONSENSE:
        found = outcome(changed(raw, path, value))
        if isinstance(found, RecipeError):
            assert str(path[-1]) in str(found), value
            assert says(str(found), value), (value, found)
        else:
            assert_usable(found, path)


def outcome(raw: dict[str, Any]) -> AnyRecipe | RecipeError:
    try:
        return parse_recipe(raw)
    except RecipeError as error:
        return error


def says(text: str, value: Any) -> bool:
    """Whether a message contains the value; it need not contain null, a list, or a mapping."""
    if value is None or isinstance(value, dict | list):
        return True
    return shown_value(value) in text or (isinstance(value, int) and f"{value:,}" in text)


def assert_usable(recipe: Any, path: Any) -> None:
    """Asserts that an accepted value is null, text, or a finite number of a usable magnitude."""
    here = recipe
    for part in path:
        here = here[part] if isinstance(part, int) else getattr(here, part)
    values = list(here.values()) if isinstance(here, dict) else here
    for value in values if isinstance(values, list | tuple) else [values]:
        if isinstance(value, bool):
            assert isinstance(here, dict)  # a model's configuration may have them
        elif isinstance(value, int | float):
            assert math.isfinite(value)
            assert value == 0 or 1e-15 <= abs(value) <= 2**53


@pytest.mark.parametrize(("raw", "path"), [f[1:3] for f in FIELDS], ids=[f[0] for f in FIELDS])
def test_values_beyond_a_bound_are_rejected(raw: dict[str, Any], path: Any) -> None:
    """The bounds are read from the JSON schema. Values at the bounds are tested by the tests of
    the arithmetic that uses them (test_extremes.py)."""
    for low, high in bounds_of(raw, path):
        for beyond in (low - 1, high + 1, high * 1.001 + 1e-300):
            with pytest.raises(RecipeError):
                parse_recipe(changed(raw, path, beyond))


def bounds_of(raw: dict[str, Any], path: Any) -> list[tuple[float, float]]:
    model = dict(sections(raw))[path[:-1]]
    schema = model.model_json_schema()
    waiting, found = [schema["properties"][path[-1]]], []
    while waiting:
        one = waiting.pop()
        if one.get("type") in ("integer", "number") and model is not TargetRecipe:
            low = one.get("minimum", one.get("exclusiveMinimum"))
            high = one.get("maximum", one.get("exclusiveMaximum"))
            assert low is not None, f"{model.__name__}.{path[-1]} has no lower bound"
            assert high is not None, f"{model.__name__}.{path[-1]} has no upper bound"
            if "items" not in schema["properties"][path[-1]]:
                found.append((low, high))
        waiting += [*one.get("anyOf", []), *one.get("prefixItems", [])]
        waiting += [one[key] for key in ("items", "additionalProperties") if key in one]
    return found

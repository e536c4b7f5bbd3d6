"""Rejects ambiguous or unusable JSON: duplicate keys in an object, lone surrogates, and values
nested so deeply that templates and hashes, which recurse, would fail."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from stillhouse.errors import DataError

_DEEPEST = 100
"""Maximum nesting depth of a row."""
_HALF_PAIR = re.compile(r"\\u[dD][89a-fA-F]")
"""The beginning of a JSON escape for a surrogate, alone or in a pair."""


class DoubleKeyError(ValueError):
    """A key occurs twice in an object."""


def parse_json(text: str, **options: Any) -> Any:
    """Like `json.loads`, but raises DoubleKeyError, a ValueError, for a duplicate key."""
    return json.loads(text, object_pairs_hook=_distinct, **options)


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise DoubleKeyError(f"the key {twice!r} occurs twice in an object")
    return found


def value_at(value: Any, place: Sequence[str]) -> Any:
    """The value under nested keys; None if there is none."""
    for key in place:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def is_suspicious(text: str) -> bool:
    """Whether JSON text might contain a lone surrogate or be nested too deeply."""
    return bool(_HALF_PAIR.search(text)) or text.count("[") + text.count("{") > _DEEPEST


def half_a_pair(half: str, where: str | None = None) -> DataError:
    """The error for a lone surrogate."""
    return DataError(
        f"The text contains {half!r}, half of a surrogate pair: it is not valid Unicode",
        where=where,
        fix="write the file again as valid UTF-8, or remove the row",
    )


def check_value(value: Any) -> None:
    """Raise DataError for a lone surrogate, and for a value that is nested too deeply."""
    left = [(value, 1)]
    while left:
        part, depth = left.pop()
        if depth > _DEEPEST:
            raise DataError(
                f"The row is nested more than {_DEEPEST} levels deep",
                fix="correct the row, or remove it",
            )
        if isinstance(part, str):
            half = re.search("[\ud800-\udfff]", part)
            if half:
                raise half_a_pair(half[0])
        elif isinstance(part, dict):
            left += [(inner, depth + 1) for pair in part.items() for inner in pair]
        elif isinstance(part, list):
            left += [(inner, depth + 1) for inner in part]

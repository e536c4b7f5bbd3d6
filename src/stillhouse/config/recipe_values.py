"""Converts a recipe's scalars according to the type that their key expects."""

from __future__ import annotations

import functools
import math
import operator
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from stillhouse.config.recipe_yaml import Key, Plain, has_surrogate
from stillhouse.errors import shown
from stillhouse.section import chosen_model, models_in

Reject = Callable[[Key, str, str], NoReturn]
"""Raises RecipeError from the key, what is wrong with its value, and what to do."""

_WHOLE = re.compile(r"[-+]?(0|[1-9][0-9]*)")
_DECIMAL = re.compile(r"[-+]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?")
_NULL = ("", "~", "null", "Null", "NULL")
_BOOLEANS = {"true": True, "True": True, "TRUE": True, "false": False, "False": False} | {
    "FALSE": False
}
_WORDS = {
    form: value
    for word, value in {"yes": True, "on": True, "no": False, "off": False}.items()
    for form in (word, word.title(), word.upper())
}
"""Words that are booleans in YAML 1.1, but text in YAML 1.2."""
_OTHER_NUMBERS: Sequence[tuple[re.Pattern[str], str, Callable[[str], Sequence[object]]]] = (
    (re.compile("0[0-7]+"), "is octal in YAML 1.1", lambda text: (int(text, 8), int(text))),
    (re.compile("0[0-9]+"), "begins with 0", lambda text: (int(text),)),
    (
        re.compile("0[xX][0-9a-fA-F]+|0[oO][0-7]+|0[bB][01]+"),
        "is not decimal",
        lambda text: (int(text, 0),),
    ),
    (
        re.compile("[0-9]+(:[0-5]?[0-9])+"),
        "is a base-60 number in YAML 1.1",
        lambda text: (_base_60(text),),
    ),
    (
        re.compile(r"[0-9][0-9_]*_[0-9_]*(\.[0-9_]*)?([eE][-+]?[0-9]+)?"),
        "has underscores",
        lambda text: (text.replace("_", ""),),
    ),
    (re.compile(r"\.(inf|Inf|INF|nan|NaN|NAN)"), "is not finite", lambda text: ()),
)
"""Unsigned text that YAML 1.1 reads as a number and most people would read differently, with what
is wrong and the ways to write it."""


def read_values(raw: Any, annotation: Any, reject: Reject, key: Key = ()) -> Any:
    """Convert a recipe's values for pydantic: `Plain` scalars by the key's type, and a quoted
    `3e-4` to a number if the key accepts floats."""
    if isinstance(raw, Mapping):
        return _mapping(raw, annotation, reject, key)
    if isinstance(raw, list):
        inner = _of_items(annotation)
        return [read_values(item, inner, reject, (*key, index)) for index, item in enumerate(raw)]
    if not isinstance(raw, str):
        return raw
    allowed = leaf_types(annotation)
    if isinstance(raw, Plain):
        return _scalar(raw, allowed, reject, key)
    if has_surrogate(raw):
        reject(key, "the text contains half of a surrogate pair", "write the complete character")
    # A dictionary that PyYAML has read contains 1e6 as text. Other quoted numbers stay text if
    # the key accepts text.
    spelled = _DECIMAL.fullmatch(raw) and ("e" in raw.lower() or str not in allowed)
    return float(raw) if float in allowed and spelled else raw


def _mapping(raw: Mapping[Any, Any], annotation: Any, reject: Reject, key: Key) -> dict[Any, Any]:
    models = models_in(annotation)
    model = chosen_model(models, raw) if models else None
    fields = model.model_fields if model else {}
    renamed = getattr(model, "renamed", {})
    inner = str | None if models else _of_items(annotation)
    read = {}
    for name, value in raw.items():
        known = fields.get(renamed.get(name, name)) if isinstance(name, str) else None
        inside = (*key, name if isinstance(name, str | int) else str(name))
        read[name] = read_values(value, known.annotation if known else inner, reject, inside)
    return read


def _scalar(text: Plain, allowed: set[Any], reject: Reject, key: Key) -> Any:
    numbers, anything = bool(allowed & {int, float}), not allowed or bool(allowed & {Any, object})
    words = str in allowed
    if text in _NULL:
        if words and text and not anything and types.NoneType not in allowed:
            reject(key, f"{text} is not text", f'write it in quotes if it is text: "{text}"')
        return None
    if text in _BOOLEANS and (bool in allowed or anything):
        return _BOOLEANS[text]
    if text in _WORDS and (bool in allowed or anything):
        if words or anything:
            meant = str(_WORDS[text]).lower()
            reject(
                key,
                f"{text} is {meant} in YAML 1.1, but text in YAML 1.2",
                f'write {meant}, or "{text}" in quotes',
            )
        return _WORDS[text]
    if numbers or anything:
        return _number(text, allowed, reject, key)
    return str(text)


def _number(text: Plain, allowed: set[Any], reject: Reject, key: Key) -> Any:
    """Convert a decimal number; leave other text, which pydantic rejects if it needs a number."""
    name, sign = shown(text), text[:1] if text[:1] in ("-", "+") else ""
    if len(text) > 400 and _DECIMAL.fullmatch(text):
        reject(key, f"the number has {len(text):,} digits", "write a smaller number")
    if _WHOLE.fullmatch(text):
        return int(text)
    for pattern, problem, meant in _OTHER_NUMBERS:
        if pattern.fullmatch(text.removeprefix(sign)):
            ways = dict.fromkeys(
                f"{sign.strip('+')}{way}" for way in meant(text.removeprefix(sign))
            )
            fix = f"write {' or '.join(ways) or 'a finite number'}"
            if bool in allowed or not allowed & {int, float}:
                fix += f', or "{name}" in quotes'
            reject(key, f"{name} {problem}", fix)
    if _DECIMAL.fullmatch(text):
        value = float(text)
        if math.isinf(value):
            reject(key, f"{name} is too large", "write a smaller number")
        if int in allowed and float not in allowed and value.is_integer() and value < 1e15:
            reject(key, f"{name} is not an integer in YAML", f"write {int(value)}")
        return value
    if (text in _BOOLEANS or text in _WORDS) and allowed & {int, float}:
        reject(key, f"{name} is a boolean, not a number", "write a number")
    return str(text)


def _base_60(text: str) -> int:
    return functools.reduce(lambda total, part: 60 * total + int(part), text.split(":"), 0)


# --- types -----------------------------------------------------------------------------------


def leaf_types(annotation: Any) -> set[Any]:
    """The types of the values in an annotation, through unions, lists, and mappings; a literal
    contributes the types of its values."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return {type(value) for value in arguments}
    if origin is typing.Annotated:
        return leaf_types(arguments[0])
    if origin is dict:
        return leaf_types(arguments[-1])
    if not arguments:
        return {annotation}
    return {leaf for argument in arguments for leaf in leaf_types(argument)}


def _of_items(annotation: Any) -> Any:
    """The type of a list's or mapping's items, which are not None even if the list may be."""
    if typing.get_origin(annotation) not in (typing.Union, types.UnionType):
        return annotation
    arguments = [one for one in typing.get_args(annotation) if one is not types.NoneType]
    return functools.reduce(operator.or_, arguments)

"""Reads tools and tool calls in their various formats, and decodes JSON text in them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from stillhouse.data.clear_json import DoubleKeyError, check_value, is_suspicious, parse_json
from stillhouse.errors import DataError, shown

_WRITE_CALL = 'write it as {"type": "function", "function": {"name": "...", "arguments": {...}}}'


def read_tools(row: Mapping[str, Any]) -> list[Any]:
    """Read the row's `tools`, or its `functions` (OpenAI's older form); JSON text is decoded."""
    tools = from_json(row.get("tools"))
    functions = from_json(row.get("functions"))
    if not tools and functions and isinstance(functions, list):
        tools = [{"type": "function", "function": function} for function in functions]
    if not tools:
        return []
    if not isinstance(tools, list):
        raise DataError(
            f"`tools` must be a list of JSON schemas, but it is {type(tools).__name__}",
            fix="write the tools as a JSON list, or remove the key",
        )
    tools = [from_json(tool) for tool in tools]
    for number, tool in enumerate(tools):
        if not isinstance(tool, Mapping):
            raise DataError(
                f"`tools[{number}]` must be a JSON schema, but it is {type(tool).__name__}",
                fix='write it as {"type": "function", "function": {"name": "...", ...}}',
            )
        _reject_other_types(tool, f"`tools[{number}]`")
    return tools


def calls_in(text: Any) -> list[dict[str, Any]] | None:
    """Parse JSON text that consists of tool calls (objects with `name` and `arguments`).

    None if it is anything else.
    """
    value = from_json(text)
    calls = value if isinstance(value, list) else [value]
    if not calls or not all(
        isinstance(c, Mapping) and isinstance(c.get("name"), str) for c in calls
    ):
        return None
    functions = (
        {"name": call["name"], "arguments": call.get("arguments", call.get("parameters", {}))}
        for call in calls
    )
    return [{"type": "function", "function": function} for function in functions]


def decode_calls(message: dict[str, Any], name: str) -> None:
    """Convert `tool_calls`, or OpenAI's older `function_call`, to a list of objects, in place."""
    if message.get("function_call"):
        call = from_json(message.pop("function_call"))
        message.setdefault("tool_calls", [{"type": "function", "function": call}])
    calls = from_json(message.get("tool_calls"))
    if not calls:
        message.pop("tool_calls", None)
        return
    calls = [from_json(call) for call in calls] if isinstance(calls, list) else [calls]
    message["tool_calls"] = [
        _with_arguments(call, f"`{name}.tool_calls[{number}]`") for number, call in enumerate(calls)
    ]


def _with_arguments(call: Any, name: str) -> dict[str, Any]:
    """Normalize the arguments of a call; missing or empty ones become {}."""
    inner = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(inner, Mapping) or not isinstance(inner.get("name"), str):
        raise DataError(f"{name} has no function with a name", fix=_WRITE_CALL)
    arguments = inner.get("arguments", inner.get("parameters"))
    if arguments is None or (isinstance(arguments, str) and not arguments.strip()):
        arguments = {}
    arguments = _bare_json(arguments)
    decoded = from_json(arguments)
    if not isinstance(decoded, Mapping):
        raise DataError(
            f"The arguments of {name} are not a JSON object: {str(arguments)[:60]!r}",
            fix=_WRITE_CALL,
        )
    _reject_other_types(decoded, f"the arguments of {name}")
    filled = {**inner, "arguments": arguments}
    return {**call, "function": filled} if "function" in call else filled


def _reject_other_types(value: Any, owner: str) -> None:
    """Raise DataError for a type that JSON lacks, such as Parquet's dates, decimals, and bytes."""
    if isinstance(value, (Mapping, list, tuple)):
        for item in value.values() if isinstance(value, Mapping) else value:
            _reject_other_types(item, owner)
    elif value is not None and not isinstance(value, (str, bool, int, float)):
        raise DataError(
            f"A value in {owner} is of type {type(value).__name__}, which JSON does not support",
            fix="write the value as a string or a number",
        )


def without_nulls(value: Any) -> Any:
    """Return the value without the null fields of its objects."""
    if isinstance(value, Mapping):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, (list, tuple)):
        return [without_nulls(item) for item in value]
    return value


def has_nulls(value: Any) -> bool:
    """Whether an object in the value has a null field."""
    if isinstance(value, Mapping):
        return any(item is None or has_nulls(item) for item in value.values())
    return isinstance(value, (list, tuple)) and any(map(has_nulls, value))


def from_json(value: Any) -> Any:
    """Decode JSON text of a list or an object, even if it is encoded several times.

    Anything else is returned unchanged. Raises DataError for ambiguous JSON: see `clear_json`.
    """
    value = _bare_json(value)
    if not isinstance(value, str) or value.lstrip()[:1] not in ("[", "{"):
        return value
    try:
        decoded = parse_json(value)
    except DoubleKeyError as error:
        raise DataError(
            f"The row contains JSON text in which {error}: {shown(value)}",
            fix="keep one of the two values",
        ) from error
    except (ValueError, RecursionError):
        return value
    if is_suspicious(value):
        check_value(decoded)
    return decoded


def _bare_json(value: Any) -> Any:
    """Undo the encoding of JSON text as a JSON string, once or more; else return the value."""
    while isinstance(value, str) and value.lstrip().startswith('"'):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            break
    return value

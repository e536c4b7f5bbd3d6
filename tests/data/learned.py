"""Shows which tokens of a row are supervised, as text."""

from __future__ import annotations

from typing import Any

from stillhouse.data.row_formats import document_from_row
from stillhouse.data.tokenize_rows import TokenRow, tokenize
from tests.chat_toys import marked


def rows_of(row: dict[str, Any], tokenizer: Any, control_tokens: Any = None) -> list[TokenRow]:
    document = document_from_row(row, "text", "rows.jsonl:3")
    assert document is not None
    return tokenize([document], tokenizer, control_tokens)[0]


def shown(row: dict[str, Any], tokenizer: Any, control_tokens: Any = None) -> str:
    """The tokenized rows as text, separated by `---`; supervised tokens are within [[ ]]."""
    rows = rows_of(row, tokenizer, control_tokens)
    return "\n---\n".join(marked(tokens, tokenizer).rstrip("\n") for tokens in rows)


def learned(row: dict[str, Any], tokenizer: Any, control_tokens: Any = None) -> list[str]:
    """Every run of supervised tokens as text, in order."""
    text = shown(row, tokenizer, control_tokens)
    return [part.split("]]")[0] for part in text.split("[[")[1:]]


def call(name: str, arguments: Any, **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}, **more}


def tool(name: str, *parameters: str) -> dict[str, Any]:
    properties = {key: {"type": "string"} for key in parameters}
    schema = {"type": "object", "properties": properties}
    return {"type": "function", "function": {"name": name, "parameters": schema}}

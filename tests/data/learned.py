"""What of a row is learned, as text."""

from __future__ import annotations

from itertools import groupby
from typing import Any

from stillhouse.data.row_formats import document_from_row
from stillhouse.data.tokenize_rows import TokenRow, tokenize


def rows_of(row: dict[str, Any], tokenizer: Any, control_tokens: Any = None) -> list[TokenRow]:
    document = document_from_row(row, "text", "rows.jsonl:3")
    assert document is not None
    return tokenize([document], tokenizer, control_tokens)[0]


def shown(row: dict[str, Any], tokenizer: Any, control_tokens: Any = None) -> str:
    """The row's tokens as text; what is learned stands in [[ ]], and rows end with a line."""
    made = []
    for tokens in rows_of(row, tokenizer, control_tokens):
        pairs = zip(tokens.supervised.tolist(), tokens.ids.tolist(), strict=True)
        runs = [(on, tokenizer.decode([token for _, token in run])) for on, run in
                groupby(pairs, key=lambda pair: pair[0])]  # fmt: skip
        made.append("".join(f"[[{text}]]" if on else text for on, text in runs).rstrip("\n"))
    return "\n---\n".join(made)


def learned(row: dict[str, Any], tokenizer: Any, control_tokens: Any = None) -> list[str]:
    """The texts that are learned, in order."""
    text = shown(row, tokenizer, control_tokens)
    return [part.split("]]")[0] for part in text.split("[[")[1:]]


def call(name: str, arguments: Any, **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}, **more}


def tool(name: str, *parameters: str) -> dict[str, Any]:
    properties = {key: {"type": "string"} for key in parameters}
    schema = {"type": "object", "properties": properties}
    return {"type": "function", "function": {"name": name, "parameters": schema}}

"""Arrow fills the missing fields of a struct with nulls, which are never learned."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stillhouse.data.data_config import FileSource, HubSource, Source
from stillhouse.data.documents import content_hash
from stillhouse.data.sources import read_sources
from stillhouse.data.tokenize_rows import tokenize

from ..data.learned import call, learned, tool
from ..data.toys import TOOLS, byte_level, chat, write_jsonl


def row(name: str, arguments: dict[str, str]) -> dict[str, Any]:
    turn = {"role": "assistant", "content": "", "tool_calls": [call(name, arguments)]}
    return {"messages": [*chat("Go."), turn], "tools": [tool(name, *arguments)]}


ROWS = [
    row("weather", {"city": "Oslo"}),
    row("add", {"a": "1", "b": "2"}),
    {"messages": chat("Hi", "Hello")},
]


@pytest.fixture
def sources(tmp_path: Path) -> dict[str, Source]:
    write_jsonl(tmp_path / "rows.jsonl", ROWS)
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "rows.parquet")
    filled = pa.Table.from_pylist(ROWS).to_pylist()  # as `Dataset.to_json` writes them
    write_jsonl(tmp_path / "filled.jsonl", filled)
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    return {
        "parquet": FileSource(kind="file", path=str(tmp_path / "rows.parquet")),
        "filled": FileSource(kind="file", path=str(tmp_path / "filled.jsonl")),
        "hub": HubSource(kind="hub", dataset=str(tmp_path / "saved")),
        "jsonl": FileSource(kind="file", path=str(tmp_path / "rows.jsonl")),
    }


@pytest.mark.parametrize("kind", ["parquet", "filled", "hub"])
def test_the_same_rows_are_learned_from_every_kind_of_file(
    kind: str, sources: dict[str, Source]
) -> None:
    tokenizer = byte_level(TOOLS)
    documents = list(read_sources([sources[kind]], Path()))
    expected = list(read_sources([sources["jsonl"]], Path()))
    assert [content_hash(one) for one in documents] == [content_hash(one) for one in expected]
    rows = [tokenizer.decode(rows[0].ids) for rows in tokenize(documents, tokenizer)]
    assert rows == [tokenizer.decode(rows[0].ids) for rows in tokenize(expected, tokenizer)]
    assert rows[0].endswith('CALL weather {"city": "Oslo"}<|im_end|>\n')
    assert not any("null" in text for text in rows)


def test_removed_nulls_are_noted(sources: dict[str, Source]) -> None:
    notes = [one.about.notes for one in read_sources([sources["parquet"]], Path())]
    assert "null fields" in notes[0][0]
    assert notes[2] == ()


def test_null_arguments_inside_json_text_are_kept() -> None:
    text = json.dumps({"city": None})
    messages = [*chat("Go."), {"role": "assistant", "tool_calls": [call("weather", text)]}]
    assert learned({"messages": messages}, byte_level(TOOLS)) == [
        'CALL weather {"city": null}<|im_end|>'
    ]

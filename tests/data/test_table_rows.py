"""Rows of CSV, TSV, and Parquet files in every dialect, and why some are rejected."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stillhouse.data.data_config import FileSource, HubSource
from stillhouse.data.documents import Document
from stillhouse.data.row_reader import read_rows
from stillhouse.data.sources import read_sources
from stillhouse.errors import DataError
from stillhouse.tasks.labeled_texts import first_rows, read_texts
from stillhouse.tasks.task_texts_config import TextFile

ROWS = [{"text": "hello, you", "label": "a"}, {"text": 'say "hi"', "label": "b"}]

# dialect: (file name, content)
DIALECTS: dict[str, tuple[str, str]] = {
    "CRLF": ("a.csv", 'text,label\r\n"hello, you",a\r\n"say ""hi""",b\r\n'),
    "CR": ("a.csv", 'text,label\r"hello, you",a\r"say ""hi""",b\r'),
    "no last line end": ("a.csv", 'text,label\n"hello, you",a\n"say ""hi""",b'),
    "blank lines": ("a.csv", '\n\ntext,label\n\n"hello, you",a\n  \n"say ""hi""",b\n\n'),
    "empty rows of a sheet": ("a.csv", 'text,label\n"hello, you",a\n"say ""hi""",b\n,\n,,,\n'),
    "semicolons": ("a.csv", 'text;label\nhello, you;a\n"say ""hi""";b\n'),
    "sep=": ("a.csv", 'sep=;\r\ntext;label\r\nhello, you;a\r\n"say ""hi""";b\r\n'),
    "tabs in .csv": ("a.csv", 'text\tlabel\nhello, you\ta\nsay "hi"\tb\n'),
    "bars": ("a.csv", 'text|label\nhello, you|a\nsay "hi"|b\n'),
    "commas in .tsv": ("a.tsv", 'text,label\n"hello, you",a\n"say ""hi""",b\n'),
    "quotes inside": ("a.tsv", 'text\tlabel\nhello, you\ta\nsay "hi"\tb\n'),
    "spaces in the header": ("a.csv", ' text , label\n"hello, you",a\n"say ""hi""",b\n'),
    "quoted header": ("a.csv", '"text","label"\n"hello, you",a\n"say ""hi""",b\n'),
    "row numbers": ("a.csv", ',text,label\n0,"hello, you",a\n1,"say ""hi""",b\n'),
    "trailing commas": ("a.csv", 'text,label,\n"hello, you",a,\n"say ""hi""",b,\n'),
    "byte order mark": ("a.csv", '\ufefftext,label\n"hello, you",a\n"say ""hi""",b\n'),
}


@pytest.mark.parametrize("case", DIALECTS)
def test_every_dialect_of_csv_is_read(case: str, tmp_path: Path) -> None:
    name, content = DIALECTS[case]
    (tmp_path / name).write_bytes(content.encode())
    assert [row for row, _ in read_rows(tmp_path / name)] == ROWS


def test_a_line_break_in_a_cell_is_unchanged(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b'text,label\r\n"two\r\nlines",a\r\nnext,b\r\n')
    rows = list(read_rows(tmp_path / "a.csv"))
    assert rows[0][0]["text"] == "two\r\nlines"
    assert rows[1][1] == f"{tmp_path / 'a.csv'}:4"


# content: (message, line)
REFUSED: dict[str, tuple[str, int]] = {
    "text,label\na,b\nc,d,e\n": ("more cells than the 2 columns of the header: 3", 3),
    "text,label\na,b\nc\n": ("fewer cells than the 2 columns of the header: 1", 3),
    "text\na, b\n": ("more cells than the 1 column of the header: 2", 2),
    "text;label\nx, y;b\nhello; you;a\n": ("more cells", 3),
    "text,label,text\na,b,c\n": ("Several columns have the name 'text'", 1),
    "text, text \na,b\n": ("Several columns have the name 'text'", 1),
    ",\na,b\n": ("The header has no names", 1),
    "text,,label\na,b,c\n": ("Cell 2 of the row is not empty, but its column has no name", 2),
    "text,label\na,b\ntext,label\nc,d\n": ("The header is repeated here", 3),
    "text,label\na,b\n\ufefftext,label\nc,d\n": ("The header is repeated here", 3),
    "text;label|more\na;b|c\n": ("semicolons and bars", 1),
    'text,label\n"a,b\nc,d\n': ("not valid CSV", 2),
    'text,label\n"say \\"hi\\"",b\n': ("not valid CSV", 2),
    'text,label\na,b\n\n"x" y,d\n': ("not valid CSV", 4),
    'text,label\na,b\n"c", "d"\n': ("spaces before its quotes", 3),
    'text,label\n"a", "b, c"\n': ("spaces before its quotes", 2),
    '"text", "label"\na,b\n': ("spaces before its quotes", 1),
}


@pytest.mark.parametrize("content", REFUSED)
def test_ambiguous_rows_are_rejected_with_their_line(content: str, tmp_path: Path) -> None:
    what, line = REFUSED[content]
    path = tmp_path / "a.csv"
    path.write_text(content)
    with pytest.raises(DataError) as caught:
        list(read_rows(path))
    assert what in caught.value.what
    assert caught.value.where == f"{path}:{line}"
    assert caught.value.fix


def test_quotes_after_a_space_are_text_if_they_do_not_enclose_the_cell(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('text,label\na," ""b"""\na, "b" c\na, b "c"\n')
    found = [row["label"] for row, _ in read_rows(tmp_path / "a.csv")]
    assert found == [' "b"', ' "b" c', ' b "c"']


def test_a_missing_header_is_reported(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("I have lost my card and do not know what to do,card\nhello,greeting\n")
    with pytest.raises(DataError, match="no text under 'text'") as caught:
        list(read_texts(TextFile(path="a.csv"), tmp_path))
    assert "add a header line with column names" in str(caught.value.fix)
    with pytest.raises(DataError, match="seems to have no header"):
        first_rows("a.csv", tmp_path)  # what `init` reads
    path.write_text(f"text,label\n{path.read_text()}")
    assert len(list(read_texts(TextFile(path="a.csv"), tmp_path))) == 2


# --- Parquet -----------------------------------------------------------------------------------


def read(path: Path, table: pa.Table) -> list[dict[str, Any]]:
    pq.write_table(table, path)
    return [row for row, _ in read_rows(path)]


def test_duplicate_column_names_in_parquet_are_rejected(tmp_path: Path) -> None:
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    with pytest.raises(DataError, match="Several columns have the name 'text'"):
        read(tmp_path / "a.parquet", table)


def test_labels_of_every_type_in_parquet_become_strings(tmp_path: Path) -> None:
    labels = {
        "category": (pa.array(["x", "y"]).dictionary_encode(), ["x", "y"]),
        "decimal": (pa.array([Decimal("1.00"), None]), ["1", None]),
        "int8": (pa.array([1, 0], pa.int8()), ["1", "0"]),
        "bool": (pa.array([True, False]), ["True", "False"]),
        "large_string": (pa.array([" x ", ""], pa.large_string()), ["x", None]),
    }
    for array, expected in labels.values():
        pq.write_table(pa.table({"text": ["a", "b"], "label": array}), tmp_path / "a.parquet")
        rows = read_texts(TextFile(path="a.parquet", label="label"), tmp_path)
        assert [row.gold for row in rows] == expected


def test_values_that_python_cannot_hold_are_an_error(tmp_path: Path) -> None:
    table = pa.table({"text": ["a"], "when": pa.array([2**62], pa.timestamp("us"))})
    with pytest.raises(DataError, match="cannot be read"):
        read(tmp_path / "a.parquet", table)


def test_metadata_that_is_not_from_datasets_is_ignored(tmp_path: Path) -> None:
    for metadata in (b"{", b"[]", b'{"info": null}', b'{"info": {"features": {"label": 5}}}'):
        table = pa.table({"text": ["a"], "label": [1]})
        table = table.replace_schema_metadata({b"huggingface": metadata})
        assert read(tmp_path / "a.parquet", table) == [{"text": "a", "label": 1}]


def test_csv_in_a_local_data_set_is_rejected_with_a_fix(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.csv").write_text("text,label\nNA,a\n")
    with pytest.raises(DataError, match="does not read CSV reliably") as caught:
        list(read_sources([HubSource(kind="hub", dataset="set")], tmp_path))
    assert "set/train.csv" in str(caught.value.fix)
    instead = FileSource(kind="file", path="set/train.csv")
    assert list(read_sources([instead], tmp_path)) == [Document("NA")]

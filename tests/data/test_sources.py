"""Reading text from every kind of source, and the errors for text that cannot be read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stillhouse.data import sources
from stillhouse.data.data_config import (
    CorpusSource,
    FileSource,
    HubSource,
    Source,
    TextSource,
)
from stillhouse.data.documents import (
    Completion,
    Conversation,
    Document,
    content_hash,
    group_hash,
)
from stillhouse.data.sources import (
    estimated_tokens,
    read_sources,
    size_estimate,
    sources_fingerprint,
)
from stillhouse.errors import DataError

from .toys import chat, write_jsonl


def read(source: Source, base: Path = Path()) -> list[Any]:
    return list(read_sources([source], base))


# --- reading ---------------------------------------------------------------------------------


def test_the_python_reference_has_one_document_per_section() -> None:
    documents = read(CorpusSource(kind="corpus"))
    topics = [document.where.split(":")[1].split(",")[0] for document in documents]
    assert len(documents) > 150
    assert all(len(document.text) > 100 for document in documents)
    assert topics == sorted(topics)
    assert sum(len(document.text) for document in documents) > 400_000
    assert len(read(CorpusSource(kind="corpus", limit=3))) == 3


def test_text_files_are_split_as_requested(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\ufeffone\n two\n \t \n\nthree\n", encoding="utf-8")
    (tmp_path / "b.txt").write_text("four", encoding="utf-8")
    expected = {
        "file": ["one\n two\n \t \n\nthree\n", "four"],
        "blank-line": ["one\n two\n", "three\n", "four"],
        "line": ["one", " two", "three", "four"],
    }
    for documents, texts in expected.items():
        for path in (".", "*.txt", str(tmp_path)):
            source = TextSource.model_validate(
                {"kind": "text", "path": path, "documents": documents}
            )
            assert [document.text for document in read(source, tmp_path)] == texts
    lines = read(TextSource(kind="text", path="a.txt", documents="blank-line"), tmp_path)
    assert [document.where.rsplit(":", 1)[1] for document in lines] == ["1", "5"]


ROWS = [
    {"text": "plain"},
    {"messages": chat("q", "a"), "text": "ignored"},
    {"prompt": "2+2=", "completion": "4"},
    {"prompt": chat("q", "a", "r"), "completion": [{"role": "assistant", "content": "b"}]},
]
DOCUMENTS = [
    Document("plain"),
    Conversation(tuple(chat("q", "a"))),
    Completion("2+2=", "4"),
    Conversation(tuple(chat("q", "a", "r", "b")), supervised_from=3),
]


def test_jsonl_rows_are_recognized(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [*ROWS, {"text": " \n"}])
    assert read(FileSource(kind="jsonl", path="a.jsonl"), tmp_path) == DOCUMENTS


def test_parquet_rows_are_recognized(tmp_path: Path) -> None:
    for number, (row, document) in enumerate(zip(ROWS, DOCUMENTS, strict=True)):
        path = tmp_path / f"{number}.parquet"
        pq.write_table(pa.Table.from_pylist([row]), path)
        assert read(FileSource(kind="parquet", path=path.name), tmp_path) == [document]
    assert len(read(FileSource(kind="parquet", path="."), tmp_path)) == len(ROWS)


def test_a_chosen_text_key_takes_precedence_over_messages(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [{"messages": chat("q", "a"), "body": "plain"}])
    source = FileSource(kind="jsonl", path="a.jsonl", text_key="body")
    assert read(source, tmp_path) == [Document("plain")]


def test_a_local_folder_is_loaded_by_datasets(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    write_jsonl(tmp_path / "set" / "train.jsonl", [{"text": "one"}, {"text": "two"}])
    for limit, texts in ((None, ["one", "two"]), (1, ["one"])):
        source = HubSource(kind="hub", dataset="set", limit=limit)
        assert [document.text for document in read(source, tmp_path)] == texts


def test_a_large_data_set_is_streamed_unless_it_is_in_the_cache(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "set").mkdir()
    for number in range(3):
        rows = [{"text": f"row {row} of file {number}"} for row in range(20)]
        write_jsonl(tmp_path / "set" / f"train-{number}.jsonl", rows)
    source = HubSource(kind="hub", dataset="set")
    load, streamed = datasets.load_dataset, []

    def recording(*names: Any, streaming: bool, **options: Any) -> Any:
        streamed.append(streaming)
        return load(*names, streaming=streaming, **options)

    monkeypatch.setattr(datasets, "load_dataset", recording)
    monkeypatch.setattr(
        sources, "_STREAMED_FROM", 1200
    )  # three files have more bytes, two have fewer
    large = read(source, tmp_path)
    monkeypatch.setattr(sources, "_STREAMED_FROM", 10_000)
    assert read(source, tmp_path) == large
    monkeypatch.setattr(sources, "_STREAMED_FROM", 1200)
    assert read(source, tmp_path) == large
    assert streamed == [True, False, False]
    assert len(large) == 60


def test_a_data_set_saved_to_disk_is_loaded(tmp_path: Path) -> None:
    saved = datasets.Dataset.from_list([{"text": "one"}])
    saved.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": saved}).save_to_disk(str(tmp_path / "dict"))
    for name in ("one", "dict"):
        assert read(HubSource(kind="hub", dataset=name), tmp_path) == [Document("one")]


def test_hashes_distinguish_content_and_groups_ignore_whitespace() -> None:
    texts = [Document("a b"), Document("a  b\n"), Document("ab"), Document("a b", where="else")]
    exact, groups = [content_hash(d) for d in texts], [group_hash(d) for d in texts]
    assert exact[0] == exact[3]
    assert len({*exact}) == 3
    assert groups[0] == groups[1] != groups[2]
    first, second = ({"role": "user", "content": "a"}, {"content": "a", "role": "user", "x": None})
    assert content_hash(Conversation((first,))) == content_hash(Conversation((second,)))
    assert content_hash(Conversation((first,))) != content_hash(Conversation((first,), 1))


def test_the_fingerprint_changes_with_the_content(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    source = TextSource(kind="text", path="a.txt")
    path.write_text("one")
    before = sources_fingerprint([source], tmp_path)
    assert before == sources_fingerprint([source], tmp_path)
    path.write_text("four")
    assert before != sources_fingerprint([source], tmp_path)
    assert size_estimate([source], tmp_path) == 4


def test_the_size_estimate_takes_the_limit_of_a_source_into_account(tmp_path: Path) -> None:
    rows = [{"text": f"row {n} {'x' * 100}"} for n in range(1000)]
    write_jsonl(tmp_path / "a.jsonl", rows)
    source = FileSource(kind="jsonl", path="a.jsonl")
    whole = (tmp_path / "a.jsonl").stat().st_size
    assert size_estimate([source], tmp_path) == whole
    for limit, low, high in ((3, 300, 400), (500, 50_000, 60_000), (10_000, whole, whole)):
        limited = source.model_copy(update={"limit": limit})
        assert low <= size_estimate([limited], tmp_path) <= high
    corpus = CorpusSource(kind="corpus", limit=2)
    assert size_estimate([corpus], tmp_path) == sum(len(one.text) for one in read(corpus))


# --- errors ----------------------------------------------------------------------------------

# name: (file's content, message, location, fix)
BAD_JSONL = {
    "broken line": (
        '{"text": "a"}\n{"text": "b"\n',
        "Invalid JSON: Expecting ',' delimiter",
        ":2",
        "correct the line",
    ),
    "one list": ('[\n{"text": "a"}]', "Invalid JSON", ":1", "one object per line"),
    "not an object": ('"text"\n', "JSON str, not an object", ":1", "as an object"),
    "misspelt key": ('{"txt": "a", "id": 1}\n', "its keys are txt, id", ":1", "text_key: txt"),
    "other key": ('{"id": "1", "body": "long"}\n', "no `text`", ":1", "text_key: body"),
    "no keys": ("{}\n", "it is empty", ":1", "remove the row"),
    "half a pair": ('{"prompt": "a"}\n', "no `prompt` with `completion`", ":1", "write both"),
    "null": (
        '{"text": "a"}\n{"text": null}\n',
        "`text` must be a string, but it is null",
        ":2",
        "",
    ),
    "NaN": ('{"text": NaN}\n', "it is NaN", ":1", "remove the row"),
    "number": ('{"text": 5}\n', "it is of type int", ":1", "as a string"),
    "empty completion": (
        '{"prompt": "a", "completion": ""}\n',
        "nothing to train on",
        ":1",
        "fill",
    ),
    "mixed pair": ('{"prompt": "a", "completion": []}\n', "must both be", ":1", "both as lists"),
    "no messages": ('{"messages": []}\n', "it is an empty list", ":1", "role"),
    "messages text": ('{"messages": "hi"}\n', "it is str", ":1", "role"),
    "message text": ('{"messages": ["hi"]}\n', "`messages[0]` must be an object", ":1", "role"),
    "no role": ('{"messages": [{"rol": "user"}]}\n', "did you mean `rol`?", ":1", "role"),
    "no content": ('{"messages": [{"role": "user"}]}\n', "has no `content`", ":1", "content"),
    "null content": ('{"messages": [{"role": "user", "content": null}]}\n', "is null", ":1", ""),
    "bad tools": (
        '{"messages": [{"role": "user", "content": "a"}], "tools": "x"}\n',
        "`tools` must be a list",
        ":1",
        "JSON list",
    ),
    "blank texts": ('{"text": " "}\n', "contains no text", "", "check the path"),
    "empty file": ("", "contains no text", "", "check the path"),
}


@pytest.mark.parametrize("case", BAD_JSONL)
def test_bad_jsonl_is_rejected_with_location_and_fix(case: str, tmp_path: Path) -> None:
    content, what, line, fix = BAD_JSONL[case]
    path = tmp_path / "a.jsonl"
    path.write_text(content)
    with pytest.raises(DataError) as error:
        read(FileSource(kind="jsonl", path="a.jsonl"), tmp_path)
    assert what in error.value.what
    assert error.value.where == f"{path}{line}"
    assert error.value.fix
    assert fix in error.value.fix


def refused(source: Source, base: Path) -> DataError:
    with pytest.raises(DataError) as error:
        read(source, base)
    assert error.value.where
    assert error.value.fix
    return error.value


def test_half_a_surrogate_pair_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "\\ud83e"}\n')
    with pytest.raises(DataError, match="surrogate pair") as error:
        read(FileSource(kind="jsonl", path="a.jsonl"), tmp_path)
    assert str(error.value.where).endswith("a.jsonl:1")
    with pytest.raises(DataError, match="surrogate pair") as error:
        content_hash(Document("\ud83e", "a data set row 1"))
    assert error.value.where == "a data set row 1"


@pytest.mark.parametrize("documents", ["file", "line", "blank-line"])
def test_text_that_is_not_utf8_is_rejected(documents: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("caf\xe9 noir".encode("latin-1"))
    source = TextSource.model_validate({"kind": "text", "path": "a.txt", "documents": documents})
    error = refused(source, tmp_path)
    assert "byte 0xe9 in line 1" in error.what
    assert error.where == str(tmp_path / "a.txt")
    assert "iconv" in str(error.fix)


def test_the_error_for_a_missing_file_suggests_a_similar_name(tmp_path: Path) -> None:
    (tmp_path / "corpus.txt").write_text("text")
    assert "did you mean corpus.txt?" in str(
        refused(TextSource(kind="text", path="corpsu.txt"), tmp_path).fix
    )
    assert "does not exist" in refused(TextSource(kind="text", path="no/x"), tmp_path).what
    assert "No file matches" in refused(TextSource(kind="text", path="*.md"), tmp_path).what
    folder = refused(FileSource(kind="jsonl", path="."), tmp_path)
    assert "has no .jsonl file" in folder.what


def test_an_empty_text_file_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(" \n\n")
    for documents in ("file", "blank-line", "line"):
        source = TextSource.model_validate(
            {"kind": "text", "path": "a.txt", "documents": documents}
        )
        assert "contains no text" in refused(source, tmp_path).what


def test_a_damaged_parquet_file_is_rejected(tmp_path: Path) -> None:
    source = FileSource(kind="parquet", path="a.parquet")
    path = tmp_path / "a.parquet"
    path.write_bytes(b"not parquet at all")
    assert "cannot be read" in refused(source, tmp_path).what
    pq.write_table(pa.table({"text": [f"number {n}" for n in range(5000)]}), path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert "cannot be read" in refused(source, tmp_path).what
    middle = len(whole) // 4
    path.write_bytes(whole[:middle] + bytes(400) + whole[middle + 400 :])
    assert "cannot be read" in refused(source, tmp_path).what


def test_errors_about_parquet_rows_give_the_row_or_its_keys(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["a", None]}), path)
    error = refused(FileSource(kind="parquet", path="a.parquet"), tmp_path)
    assert error.where == f"{path} row 1"
    assert "null" in error.what
    pq.write_table(pa.table({"body": ["a"], "id": [1]}), path)
    error = refused(FileSource(kind="parquet", path="a.parquet"), tmp_path)
    assert "its keys are body, id" in error.what
    assert "text_key: body" in str(error.fix)


def test_a_data_set_that_is_a_script_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "set.py").write_text("")
    error = refused(HubSource(kind="hub", dataset="set"), tmp_path)
    assert "scripts are no longer supported" in error.what
    assert "kind: file" in str(error.fix)


@pytest.mark.parametrize("limit", [None, 5])
def test_files_of_a_data_set_with_different_types_are_rejected(
    limit: int | None, tmp_path: Path
) -> None:
    """With a limit, the files are streamed."""
    for name, value in (("a", 1), ("b", [1])):
        table = pa.Table.from_pylist([{"text": name, "n": value}])
        pq.write_table(table, tmp_path / f"{name}.parquet")
    error = refused(HubSource(kind="hub", dataset=str(tmp_path), limit=limit), tmp_path)
    assert "Couldn't cast array" in error.what
    assert "kind: file" in str(error.fix)


def test_an_unreachable_hub_is_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def offline(*_: Any, **__: Any) -> None:
        raise ConnectionError("Couldn't reach 'org/data' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    error = refused(HubSource(kind="hub", dataset="org/data"), tmp_path)
    assert "cannot be reached" in error.what
    assert error.where == "org/data"
    assert "local folder" in str(error.fix)


def test_a_connection_that_is_lost_while_streaming_is_reported(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def stream(*_: Any, **__: Any) -> Any:
        yield {"text": "one"}
        raise ConnectionError("reset by peer")

    monkeypatch.setattr(datasets, "load_dataset", stream)
    error = refused(HubSource(kind="hub", dataset="org/data", limit=5), tmp_path)
    assert "reset by peer" in error.what


def test_an_unknown_split_of_a_local_data_set_is_reported(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", [{"text": "one"}])
    error = refused(HubSource(kind="hub", dataset=str(tmp_path), split="tets"), tmp_path)
    assert "cannot be loaded" in error.what
    assert "tets" in str(error.where)


def test_tokens_are_estimated_within_the_limit_of_each_source(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a" * 4000)
    (tmp_path / "b.txt").write_text("b" * 2000)
    limited = TextSource(kind="text", path="a.txt", tokens=300)
    other = TextSource(kind="text", path="b.txt", tokens=5000)
    assert estimated_tokens([limited, other], tmp_path, 1 / 4) == 300 + 500
    free = TextSource(kind="text", path="a.txt")
    assert estimated_tokens([free], tmp_path, 1 / 4) == 1000

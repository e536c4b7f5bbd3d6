"""`Data` from every form of text, in memory and in a folder."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import pytest
import torch

from stillhouse.data.batches import Batches, in_order
from stillhouse.data.data import Data
from stillhouse.data.data_config import HubSource
from stillhouse.data.sources import hub_rows
from stillhouse.errors import DataError, RecipeError
from tests import tiny
from tests.chat_toys import chat

LINES = tiny.text(400).splitlines()
OPTIONS: dict[str, Any] = {"context": 32, "heldout_tokens": 256}


def ids(batches: Batches) -> list[list[int]]:
    return [batches[number]["input_ids"].tolist() for number in range(len(batches))]


def same(left: Data, right: Data) -> bool:
    return ids(left.train) == ids(right.train) and ids(left.heldout) == ids(right.heldout)


@pytest.fixture(scope="module")
def of_strings() -> Data:
    return Data.build(LINES, tiny.tokenizer(), **OPTIONS)


@pytest.mark.parametrize("form", ["rows", "data set", "jsonl", "lines", "other key"])
def test_every_form_of_the_same_text_gives_the_same_windows(
    of_strings: Data, tmp_path: Path, form: str
) -> None:
    rows = [{"text": line} for line in LINES]
    texts: Any = rows
    more: dict[str, Any] = {}
    if form == "data set":
        texts = datasets.Dataset.from_list(rows)
    elif form == "jsonl":
        texts = tmp_path / "texts.jsonl"
        texts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif form == "lines":
        texts, more = str(tmp_path / "texts.txt"), {"documents": "line"}
        Path(texts).write_text("\n".join(LINES))
    elif form == "other key":
        texts, more = [{"body": line} for line in LINES], {"text_key": "body"}
    assert same(Data.build(texts, tiny.tokenizer(), **OPTIONS, **more), of_strings)


def test_a_folder_contains_the_same_windows_as_memory(of_strings: Data, tmp_path: Path) -> None:
    kept = Data.build(LINES, tiny.tokenizer(), folder=tmp_path / "windows", **OPTIONS)
    assert same(kept, of_strings)
    assert same(Data.open(tmp_path / "windows"), of_strings)


@pytest.mark.parametrize("file", ["train/input_ids.npy", "heldout/labels.npy", "train/SHA256SUMS"])
def test_a_damaged_folder_is_not_opened(tmp_path: Path, file: str) -> None:
    folder = tmp_path / "windows"
    Data.build(LINES, tiny.tokenizer(), folder=folder, **OPTIONS)
    content = bytearray((folder / file).read_bytes())
    content[-60] ^= 1
    (folder / file).write_bytes(content)
    with pytest.raises(DataError, match="The windows are damaged"):
        Data.open(folder)


def test_only_the_answers_of_chats_are_supervised() -> None:
    chats = [
        [{"role": "user", "content": a}, {"role": "assistant", "content": b}]
        for a, b in zip(LINES[::2], LINES[1::2], strict=True)
    ]
    data = Data.build(chats, tiny.tokenizer(), context=96, heldout_tokens=256)
    assert 0.2 < data.train.supervised_tokens / (len(data.train) * 96) < 0.6


def test_text_given_as_held_out_is_not_trained_on(of_strings: Data) -> None:
    data = Data.build(LINES[:300], tiny.tokenizer(), heldout=LINES[250:], **OPTIONS)
    words = tiny.tokenizer()
    trained = "".join(words.decode(row) for row in ids(data.train))
    assert LINES[0] in trained or LINES[1] in trained
    assert not any(line in trained for line in LINES[250:300])


def test_batches_go_through_the_text_in_order(of_strings: Data) -> None:
    found = torch.cat([batch["input_ids"] for batch in in_order(of_strings.train, 100)])
    assert found.tolist() == ids(of_strings.train)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ({"text": ["a"]}, "dict is not a source of text"),
        ([3], "int is not a document"),
        ([{"body": "a"}], "no `text`"),
        ("missing.jsonl", "does not exist"),
        ([], "sources are empty"),
        (pd.DataFrame({"text": LINES}), "DataFrame is not a list of texts"),
        (io.StringIO('{"text": "a"}\n'), "StringIO is not a list of texts"),
        (b"a text", "bytes is not a source of text"),
    ],
)
def test_content_that_is_not_text_is_rejected(texts: Any, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        Data.build(texts, tiny.tokenizer(), **OPTIONS)
    assert caught.value.fix


def test_an_empty_file_in_a_folder_is_skipped(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n\n".join(LINES))
    (tmp_path / "b.txt").write_text("")
    found = Data.build(tmp_path, tiny.tokenizer(), **OPTIONS)
    assert ids(found.train) == ids(
        Data.build(tmp_path / "a.txt", tiny.tokenizer(), **OPTIONS).train
    )
    with pytest.raises(DataError, match=r"contains no text(.|\n)*b\.txt"):
        Data.build(tmp_path / "b.txt", tiny.tokenizer(), **OPTIONS)


@pytest.mark.parametrize("format", ["numpy", "torch"])
def test_the_format_of_a_dataset_has_no_effect(format: str, tmp_path: Path) -> None:
    rows = [{"messages": chat(line, "yes")} for line in LINES]
    dataset = datasets.Dataset.from_list(rows).with_format(format)
    expected = ids(Data.build(rows, tiny.tokenizer(), context=64, heldout_tokens=256).train)
    assert (
        ids(Data.build(dataset, tiny.tokenizer(), context=64, heldout_tokens=256).train) == expected
    )
    dataset.save_to_disk(tmp_path)
    source = HubSource(kind="hub", dataset=str(tmp_path), split="train")
    assert [row for row, _ in hub_rows(source, tmp_path)] == rows


def test_the_records_of_a_data_frame_are_read() -> None:
    rows: Any = pd.DataFrame({"text": LINES}).to_dict("records")
    expected = ids(Data.build(LINES, tiny.tokenizer(), **OPTIONS).train)
    assert ids(Data.build(rows, tiny.tokenizer(), **OPTIONS).train) == expected


def test_an_unknown_option_is_rejected_with_a_suggestion() -> None:
    with pytest.raises(RecipeError, match="no option heldout_token") as caught:
        Data.build(LINES, tiny.tokenizer(), heldout_token=3)
    assert "heldout_tokens" in str(caught.value)


def test_repr_shows_the_context_and_the_supervised_tokens(of_strings: Data) -> None:
    supervised = of_strings.train.supervised_tokens
    assert f"windows of 32 tokens, {supervised:,} to predict" in repr(of_strings)

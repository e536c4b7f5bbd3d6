"""Text to train and evaluate on, from files, datasets, or lists."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from stillhouse.checksums import SUMS, damaged_files, read_sums, write_sums
from stillhouse.data.batches import Batches
from stillhouse.data.build_data import Texts, make_windows
from stillhouse.data.data_config import WindowsRecipe
from stillhouse.data.data_files import text_size
from stillhouse.data.file_search import find_files
from stillhouse.data.row_reader import not_empty
from stillhouse.data.sources import file_documents, row_documents
from stillhouse.data.windows import open_windows
from stillhouse.errors import DataError
from stillhouse.field_types import Seed
from stillhouse.section import checked, made, require_tokenizer

_PARTS = ("train", "heldout")

Boundary = Literal["file", "blank-line", "line"]


@dataclass(frozen=True, repr=False)
class Data:
    """Training and held-out text; no document is in both."""

    train: Batches
    heldout: Batches

    @classmethod
    def build(
        cls,
        texts: Any,
        tokenizer: Any,
        *,
        heldout: Any = None,
        context: int = 1024,
        text_key: str = "text",
        documents: Boundary = "blank-line",
        seed: int = 0,
        folder: str | Path | None = None,
        **options: Any,
    ) -> Data:
        """Tokenize, split, and pack text.

        texts: a path (a file, a folder, or a glob pattern of text, JSONL, JSON, CSV, TSV, or
        Parquet), a `datasets.Dataset`, or a list of strings, chats (lists of messages), or rows in
        any format listed in docs/data.md.
        heldout: text to evaluate on, in any of these forms; None: split documents off `texts`.
        context: tokens in a window.
        text_key: the key of a row that contains plain text.
        documents: what separates the documents in a plain text file: "blank-line", "line", or
        "file" (the file is one document, the default in a recipe).
        folder: where to keep the windows, for `Data.open`; None: keep them in memory.
        options: train_tokens, heldout_tokens, packing, long_rows, and control_tokens, as in a
        recipe's `data`.
        Raises DataError for any text that cannot be used, RecipeError for an unknown option, and
        ModelError for an object that is not a tokenizer.
        """
        seed = checked(Seed, seed, "seed")
        checked(Boundary, documents, "documents")
        require_tokenizer(tokenizer)
        section = made(WindowsRecipe, {"context": context, **options}, "Data.build")
        train = _texts(texts, text_key, documents)
        held = None if heldout is None else _texts(heldout, text_key, documents)
        out = None if folder is None else Path(folder)
        data = cls(*make_windows(train, held, tokenizer, section, seed=seed, out=out))
        if out is not None:
            for part in _PARTS:
                write_sums(out / part)
        return data

    def __repr__(self) -> str:
        return f"Data(train: {self.train!r}; held-out: {self.heldout!r})"

    @classmethod
    def open(cls, folder: str | Path) -> Data:
        """Load a folder written by `build`. Raises DataError if it is incomplete or damaged."""
        for part in _PARTS:
            _check_sums(Path(folder) / part)
        return cls(*(open_windows(Path(folder) / part) for part in _PARTS))


def _check_sums(folder: Path) -> None:
    """Raise DataError if a file has changed. A folder without checksums (a run's) passes."""
    if not (folder / SUMS).is_file():
        return
    try:
        damaged = damaged_files(folder, read_sums(folder))
    except (OSError, ValueError) as error:
        damaged = [f"{SUMS} ({error})"]
    if damaged:
        raise DataError(
            f"The windows are damaged: {damaged[0]} is missing or has changed",
            where=folder,
            fix="copy the folder again, or rebuild it with Data.build",
        )


def _texts(texts: Any, text_key: str, boundary: Boundary) -> list[Texts]:
    if isinstance(texts, str | Path):
        files = find_files(str(texts), Path.cwd())
        of_files = (file_documents(f, text_key=text_key, divided_by=boundary) for f in files)
        documents = not_empty(itertools.chain.from_iterable(of_files), "The path", texts)
        return [Texts(documents, sum(map(text_size, files)))]
    if isinstance(texts, Mapping | bytes) or not isinstance(texts, Iterable):
        raise DataError(
            f"{type(texts).__name__} is not a source of text",
            where="Data.build",
            fix="pass a path, a list of strings, chats, or rows, or one split of a dataset",
        )
    if hasattr(texts, "columns") or hasattr(texts, "readline"):
        # Iterating would yield column names, or lines regardless of the file's format.
        rows = hasattr(texts, "columns")
        raise DataError(
            f"A {type(texts).__name__} is not a list of texts",
            where="Data.build",
            fix='pass its rows: frame.to_dict("records")' if rows else "pass the file's path",
        )
    if hasattr(texts, "with_format"):
        texts = texts.with_format(None)  # a dataset may be set to return tensors
    return [Texts(row_documents(_rows(texts, text_key), text_key))]


def _rows(items: Iterable[Any], text_key: str) -> Iterator[tuple[Mapping[str, Any], str]]:
    for number, item in enumerate(items):
        where = f"texts[{number}]"
        row = {text_key: item} if isinstance(item, str) else item
        row = {"messages": row} if isinstance(row, list) else row
        if not isinstance(row, Mapping):
            raise DataError(
                f"A {type(item).__name__} is not a document",
                where=where,
                fix="pass strings, chats (lists of messages), or rows",
            )
        yield row, where

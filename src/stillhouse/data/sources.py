"""Reads the recipe's sources, lazily, into documents."""

from __future__ import annotations

import difflib
import glob
import itertools
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from stillhouse.data.corpus import python_reference
from stillhouse.data.data_config import (
    CorpusSource,
    HubSource,
    JsonlSource,
    ParquetSource,
    Source,
    TextSource,
)
from stillhouse.data.documents import AnyDocument, Document
from stillhouse.data.row_formats import document_from_row
from stillhouse.errors import DataError

_PARQUET_BATCH = 256
"""Rows decoded at a time: memory stays flat however large a row group is."""


def read_sources(sources: Sequence[Source], base: Path) -> Iterator[AnyDocument]:
    """All documents of all sources, in order, one at a time; blank texts are left out.

    `base`: the folder that relative paths start from (the recipe's own). Raises DataError for
    whatever cannot be read, and for a source that holds no text at all.
    """
    for source in sources:
        found = False
        for document in itertools.islice(_read(source, base), source.limit):
            found = True
            yield document
        if not found:
            raise DataError(
                f"This {source.kind} source holds no text: it is empty",
                where=_name(source, base),
                fix="check that the path is the one you meant, or remove the source",
            )


def size_estimate(sources: Sequence[Source], base: Path) -> int:
    """About how many characters the sources hold, for a progress bar; 0 where unknown."""
    total = 0
    for source in sources:
        if isinstance(source, CorpusSource):
            total += 465_000
        elif not isinstance(source, HubSource):
            total += sum(path.stat().st_size for path in source_files(source, base))
    return total


def _name(source: Source, base: Path) -> str:
    if isinstance(source, CorpusSource):
        return source.name
    return source.dataset if isinstance(source, HubSource) else str(base / source.path)


def _read(source: Source, base: Path) -> Iterator[AnyDocument]:
    match source:
        case CorpusSource():
            return python_reference()
        case TextSource():
            return _per_file(source, base, _read_text)
        case JsonlSource():
            return _per_file(source, base, _read_jsonl)
        case ParquetSource():
            return _per_file(source, base, _read_parquet)
        case HubSource():
            return _read_hub(source, base)


def _per_file(source: Any, base: Path, read: Any) -> Iterator[AnyDocument]:
    for path in source_files(source, base):
        try:
            yield from read(source, path)
        except UnicodeDecodeError as error:
            raise DataError(
                f"The file is not UTF-8: byte {error.object[error.start]:#04x} cannot be read",
                where=path,
                fix=f"convert it, e.g. iconv -f LATIN1 -t UTF-8 {path.name} > utf8-{path.name}",
            ) from error
        except PermissionError as error:
            raise DataError(
                "The file cannot be opened: permission denied",
                where=path,
                fix=f"allow reading it: chmod u+r {path.name}",
            ) from error


_SUFFIX = {"text": ".txt", "jsonl": ".jsonl", "parquet": ".parquet"}


def source_files(source: TextSource | JsonlSource | ParquetSource, base: Path) -> list[Path]:
    """The files of a path, folder or glob, sorted; DataError where there is none."""
    path = (base / Path(source.path).expanduser()).absolute()
    suffix = _SUFFIX[source.kind]
    if path.is_file():
        return [path]
    if path.is_dir():
        files = sorted(file for file in path.rglob(f"*{suffix}") if file.is_file())
        if files:
            return files
        raise DataError(
            f"The folder holds no {suffix} file",
            where=path,
            fix=f"name the files themselves: path: {source.path.rstrip('/')}/*.EXT",
        )
    if glob.has_magic(source.path):
        files = sorted(Path(name) for name in glob.glob(str(path), recursive=True))
        files = [file for file in files if file.is_file()]
        if files:
            return files
        raise DataError("No file matches", where=path, fix="check the pattern and its folder")
    raise DataError(
        "The file does not exist",
        where=path,
        fix=_nearest_file(path) or "check the path; a relative one starts at the recipe's folder",
    )


def _nearest_file(path: Path) -> str | None:
    if not path.parent.is_dir():
        return None
    names = [file.name for file in path.parent.iterdir()]
    near = difflib.get_close_matches(path.name, names, 1)
    return f"did you mean {near[0]}?" if near else None


# --- text ------------------------------------------------------------------------------------


def _read_text(source: TextSource, path: Path) -> Iterator[Document]:
    with path.open(encoding="utf-8-sig") as lines:
        if source.documents == "file":
            text = lines.read()
            if text.strip():
                yield Document(text, str(path))
        elif source.documents == "line":
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield Document(line.rstrip("\n"), f"{path}:{number}")
        else:
            yield from _paragraphs(lines, path)


def _paragraphs(lines: Iterator[str], path: Path) -> Iterator[Document]:
    """Documents between blank lines; a line of nothing but whitespace is blank."""
    block: list[str] = []
    for number, line in enumerate(itertools.chain(lines, [""]), 1):
        if line.strip():
            block.append(line)
        elif block:
            yield Document("".join(block), f"{path}:{number - len(block)}")
            block = []


# --- JSONL and Parquet -----------------------------------------------------------------------


def _read_jsonl(source: JsonlSource, path: Path) -> Iterator[AnyDocument]:
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            where = f"{path}:{number}"
            document = document_from_row(_json_object(line, number, where), source.text_key, where)
            if document is not None:
                yield document


def _json_object(line: str, number: int, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        if number == 1 and line.lstrip()[:1] == "[":
            fix = "this looks like one JSON list: write one object a line (jq -c '.[]')"
        else:
            fix = "correct the line, or remove it; each line must be one whole JSON object"
        detail = "nested too deeply"
        if isinstance(error, json.JSONDecodeError):
            detail = f"{error.msg}, column {error.colno}"
        raise DataError(f"Invalid JSON: {detail}", where=where, fix=fix) from error
    if isinstance(row, dict):
        return row
    raise DataError(
        f"The line is a JSON {type(row).__name__}, not an object",
        where=where,
        fix='write each line as an object, e.g. {"text": "..."}',
    )


def _read_parquet(source: ParquetSource, path: Path) -> Iterator[AnyDocument]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(path)
        names = table.schema_arrow.names
        wanted = {source.text_key, "messages", "prompt", "completion", "tools"}
        columns = [name for name in names if name in wanted]
        if not columns or columns == ["tools"]:
            columns = names  # for the error message
        number = 0
        for batch in table.iter_batches(_PARQUET_BATCH, columns=columns):
            for row in batch.to_pylist():
                where = f"{path} row {number}"
                document = document_from_row(row, source.text_key, where)
                if document is not None:
                    yield document
                number += 1
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, PermissionError):
            raise
        raise DataError(
            f"The Parquet file cannot be read: {str(error).splitlines()[0]}",
            where=path,
            fix="it is damaged or not Parquet: download or write it again",
        ) from error


# --- Hugging Face data sets --------------------------------------------------------------------


def _read_hub(source: HubSource, base: Path) -> Iterator[AnyDocument]:
    with _hub_errors(source):
        for number, row in enumerate(_load_dataset(source, base)):
            where = f"{source.dataset} [{source.split}] row {number}"
            document = document_from_row(row, source.text_key, where)
            if document is not None:
                yield document


def _local_folder(source: HubSource, base: Path) -> Path:
    return (base / Path(source.dataset).expanduser()).absolute()


def _load_dataset(source: HubSource, base: Path) -> Any:
    """Streams where a limit makes most of the data unneeded; else uses the local cache."""
    import datasets

    local = _local_folder(source, base)
    if (local / "state.json").exists() or (local / "dataset_dict.json").exists():
        loaded = datasets.load_from_disk(str(local))
        return loaded[source.split] if isinstance(loaded, dict) else loaded
    name = str(local) if local.is_dir() else source.dataset
    streaming = source.limit is not None
    return datasets.load_dataset(name, source.config, split=source.split, streaming=streaming)


@contextmanager
def _hub_errors(source: HubSource) -> Iterator[None]:
    """What `datasets` raises, on loading or in the middle of a stream, as one DataError."""
    import datasets
    from huggingface_hub.errors import HfHubHTTPError

    try:
        yield
    except DataError:
        raise
    except (ConnectionError, HfHubHTTPError, TimeoutError) as error:
        raise DataError(
            f"The data set cannot be reached: {_first_line(error)}",
            where=source.dataset,
            fix="check the network and HF_HUB_OFFLINE, or give a local folder in `dataset`",
        ) from error
    except (datasets.exceptions.DatasetsError, OSError, ValueError, KeyError) as error:
        raise DataError(
            f"The data set cannot be loaded: {_first_line(error)}",
            where=f"{source.dataset}, config {source.config}, split {source.split}",
            fix="check the id, config and split on huggingface.co/datasets, or the local folder; "
            "a private data set needs HF_TOKEN in the environment",
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]

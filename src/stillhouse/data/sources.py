"""Reads documents from a recipe's sources, lazily."""

from __future__ import annotations

import glob
import itertools
import platform
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

from stillhouse.data.data_config import CorpusSource, FileSource, HubSource, Source, TextSource
from stillhouse.data.data_files import FileFormat, format_of, text_size
from stillhouse.data.documents import AnyDocument, Document, row_size
from stillhouse.data.file_search import files_with, find_files
from stillhouse.data.row_formats import document_from_row
from stillhouse.data.row_reader import not_empty, read_rows, text_lines
from stillhouse.data.table_rows import Rows
from stillhouse.disk_errors import download_errors
from stillhouse.errors import DataError, StillhouseError

HEADING = re.compile(r"^(?=[^\n]*\S[^\n]*\n([*=~^-])\1{2,}\n)", re.MULTILINE)
SHORTEST = 400
"""Minimum length in characters; a shorter section is joined with the next one."""


def python_reference() -> Iterator[Document]:
    """Yield one document per section, topic by topic; about 465 kB of English prose and code.

    Topics repeat each other's sections. As separate documents, these are recognized as duplicates,
    and held-out text comes from many places rather than from two long topics.
    """
    from pydoc_data.topics import topics

    for topic in sorted(topics):
        for number, section in enumerate(_sections(topics[topic]), 1):
            yield Document(section + "\n", where=f"python-reference:{topic}, section {number}")


def _sections(text: str) -> Iterator[str]:
    held = ""
    starts = [0, *(match.start() for match in HEADING.finditer(text) if match.start()), len(text)]
    for start, end in pairwise(starts):
        held += text[start:end]
        if len(held) >= SHORTEST:
            yield held.strip()
            held = ""
    if held.strip():
        yield held.strip()


CHARACTERS_PER_TOKEN = 4.5
"""An estimate for text that is not tokenized yet. It is on the high side, because a run that fits
must not be refused."""
_CORPUS_CHARACTERS = 465_000
_SAMPLED = 100
"""Number of documents that are read to estimate the size of a source with a limit."""
_STREAMED_FROM = 2 << 30
"""Size in bytes, compressed or not, from which a split of a dataset is streamed."""


def read_sources(sources: Sequence[Source], base: Path) -> Iterator[AnyDocument]:
    """Yield the documents of all sources in order, skipping blank texts.

    base: the folder that relative paths start from (the recipe's). Raises DataError for anything
    that cannot be read, and for a source without text.
    """
    for source in sources:
        documents = itertools.islice(_read(source, base), source.limit)
        yield from not_empty(documents, f"This {source.kind} source", _name(source, base))


def size_estimate(sources: Sequence[Source], base: Path) -> int:
    """Estimate the number of characters that are read from the sources; 0 if unknown.

    For a source with a limit, some documents are read. Raises DataError if they cannot be read.
    """
    return sum(_size(source, base) for source in sources)


def _size(source: Source, base: Path) -> int:
    if isinstance(source, HubSource):
        return 0
    total = _CORPUS_CHARACTERS
    if not isinstance(source, CorpusSource):
        total = sum(map(text_size, source_files(source, base)))
    if source.limit is None:
        return total
    first = itertools.islice(_read(source, base), min(source.limit, _SAMPLED))
    sizes = list(map(row_size, first))
    return min(total, sum(sizes) * source.limit // max(1, len(sizes)))


def estimated_tokens(
    sources: Sequence[Source], base: Path, rate: float = 1 / CHARACTERS_PER_TOKEN
) -> float:
    """Estimate the number of tokens used from the sources, excluding sources of unknown size.

    rate: tokens per character.
    """
    total = 0.0
    for source in sources:
        tokens = size_estimate([source], base) * rate
        total += tokens if source.tokens is None else min(tokens or source.tokens, source.tokens)
    return total


def has_unknown_size(sources: Sequence[Source]) -> bool:
    """Whether any source's size is unknown until it is read: a dataset without a `tokens` limit."""
    return any(isinstance(source, HubSource) and source.tokens is None for source in sources)


def source_files(source: TextSource | FileSource, base: Path) -> list[Path]:
    """The source's files, sorted. Raises DataError if there are none."""
    return find_files(source.path, base, _format(source))


def _format(source: TextSource | FileSource) -> FileFormat | None:
    return None if source.kind == "file" else source.kind


def _name(source: Source, base: Path) -> str:
    if isinstance(source, CorpusSource):
        return source.name
    return source.dataset if isinstance(source, HubSource) else str(base / source.path)


def _read(source: Source, base: Path) -> Iterator[AnyDocument]:
    match source:
        case CorpusSource():
            yield from python_reference()
        case TextSource():
            for path in source_files(source, base):
                yield from _text_documents(path, source.documents)
        case FileSource():
            for path in source_files(source, base):
                yield from file_documents(path, _format(source), text_key=source.text_key)
        case HubSource():
            yield from row_documents(hub_rows(source, base), source.text_key)


def row_documents(
    rows: Iterable[tuple[Mapping[str, Any], str]], text_key: str
) -> Iterator[AnyDocument]:
    """Yield the documents in rows, each with its place; a row without text is skipped."""
    for row, where in rows:
        document = document_from_row(row, text_key, where)
        if document is not None:
            yield document


# --- files -----------------------------------------------------------------------------------


def file_documents(
    path: Path, format: FileFormat | None = None, *, text_key: str, divided_by: str = "file"
) -> Iterator[AnyDocument]:
    """Yield the documents of a file.

    format: None: decide by the extension. divided_by: what separates documents in plain text.
    """
    format = format or format_of(path)
    if format == "text":
        return _text_documents(path, divided_by)
    # Read all columns, because a note lists the unused ones.
    return row_documents(read_rows(path, format=format), text_key)


def _text_documents(path: Path, divided_by: str) -> Iterator[Document]:
    lines = text_lines(path)
    if divided_by == "file":
        text = "".join(lines)
        if text.strip():
            yield Document(text, str(path))
    elif divided_by == "line":
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield Document(line.rstrip("\n"), f"{path}:{number}")
    else:
        yield from _paragraphs(lines, path)


def _paragraphs(lines: Iterator[str], path: Path) -> Iterator[Document]:
    """Yield the documents between blank lines; a line of only whitespace is blank."""
    block: list[str] = []
    for number, line in enumerate(itertools.chain(lines, [""]), 1):
        if line.strip():
            block.append(line)
        elif block:
            yield Document("".join(block), f"{path}:{number - len(block)}")
            block = []


# --- Hugging Face datasets --------------------------------------------------------------------


_FILES = "read the files themselves: `kind: file` in data.sources, or `path` for prompts"


def hub_rows(source: HubSource, base: Path) -> Rows:
    """Yield the rows of a dataset. Raises DataError, also in the middle of a stream."""
    with _hub_errors(source):
        for number, row in enumerate(_load_dataset(source, base)):
            yield row, f"{source.dataset} [{source.split}] row {number}"


def _load_dataset(source: HubSource, base: Path) -> Any:
    """Load a split; stream it if it is large or has a limit. Otherwise, `datasets` first downloads
    it completely and copies it to its cache."""
    import datasets

    local = (base / source.dataset).absolute()
    if (local / "state.json").exists() or (local / "dataset_dict.json").exists():
        loaded = datasets.load_from_disk(str(local))
        split = loaded[source.split] if isinstance(loaded, dict) else loaded
        return split.with_format(None)  # the saved format may return tensors
    if local.is_dir() and glob.has_magic(str(local)):
        raise DataError(
            "`datasets` would read the brackets or stars in the folder's name as a pattern",
            where=local,
            fix=f"{_FILES}; or rename the folder",
        )
    guessed = min(files_with(local, (".csv", ".tsv")), default=None)
    if guessed is not None:
        csv = guessed.relative_to(local)
        raise DataError(
            "`datasets` does not read CSV reliably: it reads NA as an empty cell, and extra cells "
            f"shift the others ({csv})",
            where=local,
            fix=f"{_FILES}, with the files of the split: {source.dataset}/{csv}",
        )
    name = str(local) if local.is_dir() else source.dataset
    streaming = source.limit is not None or _is_large(name, source)
    return datasets.load_dataset(name, source.config, split=source.split, streaming=streaming)


def _is_large(name: str, source: HubSource) -> bool:
    """Whether a split is large enough to stream: its files have at least `_STREAMED_FROM` bytes and
    are not in the cache yet."""
    import datasets
    import fsspec

    builder = datasets.load_dataset_builder(name, source.config)
    if Path(builder.cache_dir).exists():
        return False
    size = 0
    for file in (builder.config.data_files or {}).get(source.split, []):
        size += fsspec.core.url_to_fs(file)[0].size(file)
        if size >= _STREAMED_FROM:
            return True
    return False


@contextmanager
def _hub_errors(source: HubSource) -> Iterator[None]:
    """Convert errors of `datasets` to DataErrors."""
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HfHubHTTPError

    try:
        with download_errors():
            yield
    except StillhouseError:
        raise
    except (ConnectionError, HfHubHTTPError, TimeoutError) as error:
        raise DataError(
            f"The dataset cannot be reached: {_reason(error)}",
            where=source.dataset,
            fix="check the network and HF_HUB_OFFLINE, or use a local folder in `dataset`",
        ) from error
    # RuntimeError: the dataset is a script. TypeError: its files have different columns.
    except (DatasetsError, OSError, ValueError, KeyError, RuntimeError, TypeError) as error:
        raise DataError(
            f"The dataset cannot be loaded: {_reason(error)}",
            where=f"{source.dataset}, config {source.config}, split {source.split}",
            fix="check the id, config and split on huggingface.co/datasets, or the local folder; "
            "a private dataset needs HF_TOKEN in the environment; if `datasets` cannot read the "
            f"files together, {_FILES}",
        ) from error


def _reason(error: BaseException) -> str:
    """The error on one line; the cause of "An error occurred while generating the dataset"."""
    from datasets.exceptions import DatasetGenerationError

    if isinstance(error, DatasetGenerationError) and error.__cause__ is not None:
        return _reason(error.__cause__)
    return " ".join(str(error).split())[:300] or type(error).__name__


# --- changes ------------------------------------------------------------------------------------


def sources_fingerprint(sources: Sequence[Source], base: Path) -> list[str]:
    """One line per file with its name, size, and modification time; for a corpus, one line with the
    Python version.

    A Hub dataset is identified by its name, so it is read again only if the recipe changes. Raises
    DataError if files are missing.
    """
    lines = []
    for source in sources:
        if isinstance(source, CorpusSource):
            lines.append(f"{source.name} of Python {platform.python_version()}")
        elif isinstance(source, HubSource):
            local = base / source.dataset
            files = sorted(p for p in local.rglob("*") if p.is_file()) if local.is_dir() else []
            lines += [source.dataset, *map(_stamp, files)]
        else:
            lines += map(_stamp, source_files(source, base))
    return lines


def _stamp(path: Path) -> str:
    facts = path.stat()
    return f"{path.name} {facts.st_size} {facts.st_mtime_ns}"

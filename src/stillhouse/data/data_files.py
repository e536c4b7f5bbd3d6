"""Opens data files: formats, compression, and encodings.

The extension determines the format, and the file's first bytes must not contradict it. A file that
cannot be opened in the format of its name raises a DataError.
"""

from __future__ import annotations

import bz2
import codecs
import difflib
import io
import lzma
import os
import re
import shlex
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Literal

from stillhouse.data.text_encoding import (
    guessed_encoding,
    iconv_name,
    marked_encoding,
    unmarked_utf16,
)
from stillhouse.errors import DataError

FileFormat = Literal["text", "jsonl", "json", "csv", "tsv", "parquet"]

FORMATS: dict[str, FileFormat] = {
    ".txt": "text",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
}
ALSO_TEXT = (".text", ".md", ".markdown", ".rst")
"""Read as text only if the file itself is named: in a folder, such files describe the data."""
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2", ".xz": "xz"}
_UNPACK = {"gzip": "gzip -dc", "zstd": "zstd -dc", "bz2": "bzip2 -dc", "xz": "xz -dc"}
_COMPRESSED = 3
"""Approximate ratio of a text's size to the size of its compressed file."""
READ_ERRORS = (OSError, EOFError, lzma.LZMAError)
"""Exceptions that reading or decompressing a file can raise."""
_HEAD = 4096
"""Number of leading bytes that are used to recognize a file's content."""
_DAMAGED = "write the file again: it is damaged, or its content does not match its extension"
_ANY_FORMAT = "give it the extension of its format: .txt, .jsonl, .json, .csv, .tsv, or .parquet"

_CONVERT = {
    **dict.fromkeys(
        (".zip", ".jar"), "unpack it, and use the path of its content: unzip {0} -d {folder}"
    ),
    **dict.fromkeys((".tar", ".tgz", ".tbz", ".tbz2", ".txz"), "unpack it: tar -xf {}"),
    ".7z": "unpack it: 7z x {}",
    ".rar": "unpack it: unrar x {}",
    ".lz4": "unpack it: lz4 -d {}",
    ".br": "unpack it: brotli -d {}",
    ".lzma": "unpack it: unlzma {}",
    ".z": "unpack it: uncompress {}",
    ".pdf": "extract its text: pdftotext {}",
    **dict.fromkeys(
        (".docx", ".odt", ".rtf", ".epub", ".html", ".htm"),
        "convert it: pandoc -t plain {0} -o {0}.txt",
    ),
    **dict.fromkeys((".doc", ".pages"), "save it as plain text, .txt"),
    **dict.fromkeys((".xlsx", ".xls", ".ods", ".numbers"), "save the sheet as CSV in UTF-8"),
    **dict.fromkeys((".arrow", ".feather", ".orc", ".avro"), "save its rows as Parquet or JSONL"),
    **dict.fromkeys((".pkl", ".pickle", ".npy", ".npz", ".pt"), "save its rows as JSONL"),
    **dict.fromkeys((".db", ".sqlite", ".sqlite3"), "export the table as CSV"),
}
"""What to do with files that are not read, by extension."""

_PARQUET = "a Parquet file"
_CONTENTS = (
    (rb"version https://git-lfs\.github\.com/spec/", "a Git LFS pointer", "fetch it: git lfs pull"),
    (rb"\x1f\x8b", "gzip-compressed", "add .gz to its name"),
    (rb"\x28\xb5\x2f\xfd", "zstd-compressed", "add .zst to its name"),
    (rb"BZh[1-9](1AY&SY|\x17rE8P\x90)", "bzip2-compressed", "add .bz2 to its name"),
    (rb"\xfd7zXZ\0", "xz-compressed", "add .xz to its name"),
    (rb"PAR1[^\n]{0,9}[\0-\x08\x0e-\x1f]", _PARQUET, "name it .parquet"),
    (rb"PK\x03\x04.{26}(\[Content_Types\]|_rels/|word/|xl/|docProps/|mimetype)", "an office "
     "document", "save it as plain text (.txt) or, if it is a spreadsheet, as CSV"),
    (rb"PK\x03\x04", "a ZIP archive", "unpack it: unzip {}"),
    (rb"7z\xbc\xaf\x27\x1c", "a 7-Zip archive", "unpack it: 7z x {}"),
    (rb"\xd0\xcf\x11\xe0", "an office document", "save it as plain text (.txt) or as CSV"),
    (rb"%PDF-", "a PDF", "extract its text: pdftotext {}"),
    (rb"ARROW1\0\0", "an Arrow file", "save its rows as Parquet or JSONL"),
    (rb"SQLite format 3\0", "an SQLite database", "export the table as CSV"),
    (rb".{257}ustar", "a tar archive", "unpack it: tar -xf {}"),
    (rb"\{\\rtf", "rich text (RTF)", "save it as plain text, .txt"),
)  # fmt: skip
"""How a file can begin, what kind of file that is, and what to do with it."""
_PAGE = re.compile(rb"\s*(<!doctype\s+html|<html|<\?xml)", re.IGNORECASE)


# --- names -----------------------------------------------------------------------------------


def format_of(path: Path) -> FileFormat:
    """The format by the extension, ignoring compression. Raises DataError if it is unknown."""
    found = known_format(path)
    if found is not None:
        return found
    extension = extension_of(path)
    raise DataError(
        f"Files with the extension {extension} are not supported"
        if extension
        else "The file has no extension, so its format is unknown",
        where=path,
        fix=conversion(path) or _ANY_FORMAT,
    )


def conversion(path: Path) -> str | None:
    """How to convert a file of an unsupported format; None if unknown."""
    fix = _CONVERT.get(extension_of(path))
    folder = shlex.quote(str(path.with_suffix("")))
    return None if fix is None else fix.format(shlex.quote(str(path)), folder=folder)


def known_format(path: Path) -> FileFormat | None:
    """Like `format_of`, but None for an unknown extension."""
    extension = extension_of(path)
    return "text" if extension in ALSO_TEXT else FORMATS.get(extension)


def is_text(path: Path) -> bool:
    """Whether a file is plain text by its extension or, if that is unknown, by its content."""
    if known_format(path) is not None or conversion(path) is not None:
        return known_format(path) == "text"
    try:
        with open_text(path) as lines:
            lines.read(_HEAD)
    except DataError:
        return False
    return True


def text_size(path: Path) -> int:
    """The approximate number of characters in a file."""
    return path.stat().st_size * (_COMPRESSED if is_compressed(path) else 1)


def is_compressed(path: Path) -> bool:
    return path.suffix.lower() in COMPRESSIONS


def extension_of(path: Path) -> str:
    """The extension in lower case, with the dot; of a compressed file, that of its content."""
    suffix = path.suffix.lower()
    return Path(path.stem).suffix.lower() if suffix in COMPRESSIONS else suffix


def missing(path: Path, fix: str | None = None) -> DataError:
    if path.is_symlink():
        target = os.readlink(path)
        return DataError(
            f"The file is a link to {target}, which does not exist",
            where=path,
            fix="restore the target, or use a different file",
        )
    try:
        names = [file.name for file in path.parent.iterdir()]
    except OSError:
        names = []
    near = difflib.get_close_matches(path.name, names, 1)
    advice = "check the path; in a recipe, a relative path starts at the recipe's folder"
    if near:
        advice = f"did you mean {near[0]}?"
    return DataError("The file does not exist", where=path, fix=fix or advice)


def regular(path: Path) -> Path:
    """Return the path. Raises DataError if it is not a regular file (a pipe might never end), or if
    its name is not UTF-8, since no message or file can contain it."""
    if not str(path).isascii() and re.search("[\ud800-\udfff]", str(path)):
        raise DataError("The file's name is not UTF-8", where=path, fix="rename the file")
    if not stat.S_ISREG(path.stat().st_mode):
        raise DataError(
            "The path is a folder, a pipe, or a device, not a file",
            where=path,
            fix="save its content to a file, and use that file",
        )
    return path


def regular_if_there(path: Path) -> Path:
    """Like `regular`, but does not reject a missing file: the reader reports it."""
    return regular(path) if path.exists() else path


# --- content ---------------------------------------------------------------------------------


@contextmanager
def open_text(
    path: Path, format: FileFormat = "text", newline: str | None = None
) -> Iterator[IO[str]]:
    """Open a text file, decompressed: UTF-8, or UTF-16 or UTF-32 with a byte order mark.

    format: the expected format. newline: as for `open`. Raises DataError, also while reading.
    """
    encoding = "utf-8-sig"
    try:
        with open_bytes(path) as raw:
            head = raw.read(_HEAD)
        encoding = marked_encoding(head)
        check_content(path, head, format)
        with (
            open_bytes(path) as raw,
            io.TextIOWrapper(raw, encoding=encoding, newline=newline) as lines,
        ):
            yield lines
    except UnicodeDecodeError as error:
        raise _undecodable(path, encoding) from error
    except READ_ERRORS as error:
        raise unreadable(path, error) from error


def open_bytes(path: Path) -> Any:
    """Open a file to read its decompressed bytes."""
    regular(path)
    match COMPRESSIONS.get(path.suffix.lower()):
        case None:
            return path.open("rb")
        case "bz2":
            return bz2.open(path)
        case "xz":
            return lzma.open(path)
        case compression:
            import pyarrow as pa

            return pa.input_stream(str(path), compression=compression)


def check_content(path: Path, head: bytes, format: FileFormat) -> None:
    """Raise DataError if a file's first bytes do not fit its format."""
    head = head.removeprefix(codecs.BOM_UTF8)
    for beginning, what, fix in _CONTENTS:
        expected = format == "parquet" and what == _PARQUET
        if not expected and re.match(beginning, head, re.DOTALL):
            if fix.startswith("add .") and is_compressed(path):
                what, fix = "compressed twice", _unpack_once(path, fix.split()[1])
            else:
                fix = fix.format(shlex.quote(str(path)))
            raise DataError(f"The file is {what}", where=path, fix=fix)
    if format != "text" and _PAGE.match(head):
        raise DataError(
            "The file is a web page or XML: perhaps an error page was downloaded instead of data",
            where=path,
            fix="open it to see the reason, and download the data again",
        )
    if b"\0" in head and format != "parquet" and marked_encoding(head) == "utf-8-sig":
        encoding = unmarked_utf16(head)
        if encoding is None:
            raise DataError("The file is not text: it has null bytes", where=path, fix=_DAMAGED)
        raise DataError(
            f"The file is {encoding} without a byte order mark",
            where=path,
            fix=_iconv(path, encoding),
        )


def _unpack_once(path: Path, inner: str) -> str:
    """How to unpack a file that is compressed twice. inner: the inner compression's extension."""
    new = path.with_name(f"once-{path.with_suffix('').name}{inner}")
    unpack = _UNPACK[COMPRESSIONS[path.suffix.lower()]]
    old = shlex.quote(str(path))
    return f"unpack it once, and use the new file: {unpack} {old} > {shlex.quote(str(new))}"


def _undecodable(path: Path, encoding: str) -> DataError:
    """The error for a file that is not UTF-8: its first bad byte, and how to convert it."""
    if encoding != "utf-8-sig":
        return DataError(f"The file is not valid {encoding.upper()}", where=path, fix=_DAMAGED)
    first, at, other = b"", 0, False
    wrong: list[bytes] = []
    with open_bytes(path) as raw:
        for number, line in enumerate(io.BufferedReader(raw), 1):
            if line.isascii():
                continue
            try:
                line.decode()
                other = True
            except UnicodeDecodeError as error:
                at, first = at or number, first or line[error.start : error.start + 1]
                if not line[: error.start].isascii():
                    other = True
                elif sum(map(len, wrong)) < 1 << 16:
                    wrong.append(line[: 1 << 16])
    what = f"The file is not UTF-8: byte {first[0]:#04x} in line {at} cannot be decoded"
    guess = guessed_encoding(b"".join(wrong)) if wrong else None
    if other:
        shown = "" if guess is None else f" (as {iconv_name(guess)}: {_shown(wrong[0], guess)})"
        what += ", but the text around it can: it mixes encodings, or is truncated or damaged"
        fix = f"write line {at} again{shown}"
    elif guess is None:
        fix = _iconv(path, "ITS-ENCODING")
    else:
        shown = _shown(wrong[0], guess)
        fix = f"{_iconv(path, iconv_name(guess))}, if line {at} should read {shown}"
    return DataError(what, where=path, fix=fix)


def _shown(line: bytes, encoding: str) -> str:
    text = line.decode(encoding, "replace").strip()
    odd = next((at for at, c in enumerate(text) if c > "\x7f"), 0)
    return repr(text[max(0, odd - 20) : odd + 20])


def _iconv(path: Path, encoding: str) -> str:
    """How to convert a file to UTF-8, as a new file next to it."""
    compression = COMPRESSIONS.get(path.suffix.lower())
    plain = path.with_suffix("") if compression else path
    new = shlex.quote(str(plain.with_name(f"utf8-{plain.name}")))
    old = shlex.quote(str(path))
    unpacked = f"{_UNPACK[compression]} {old} | " if compression else ""
    command = f"{unpacked}iconv -f {encoding} -t UTF-8{'' if compression else f' {old}'} > {new}"
    return f"convert it, and use the new file: {command}"


def unreadable(path: Path, error: Exception) -> DataError:
    if isinstance(error, FileNotFoundError):
        return missing(path)
    if isinstance(error, PermissionError):
        return DataError(
            "The file cannot be opened: permission denied",
            where=path,
            fix=f"grant read permission: chmod u+r {shlex.quote(str(path))}",
        )
    reason = (str(error) or type(error).__name__).splitlines()[0]
    return DataError(f"The file cannot be read: {reason}", where=path, fix=_DAMAGED)

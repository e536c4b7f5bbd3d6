"""Finds the files that a recipe's path refers to: a file, a folder, or a glob pattern."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from stillhouse.data.data_files import (
    ALSO_TEXT,
    COMPRESSIONS,
    FORMATS,
    FileFormat,
    conversion,
    extension_of,
    missing,
    regular,
)
from stillhouse.errors import DataError

_URL = re.compile(r"[A-Za-z][\w+.-]+://")
_ABOUT = re.compile(r"readme|licen[cs]e|changelog|contributing|copying", re.IGNORECASE)
"""Names of files that describe a folder."""


def find_files(name: str, base: Path, format: FileFormat | None = None) -> list[Path]:
    """The files of a path, folder, or glob pattern, sorted; hidden files only if they are named.

    base: the folder that relative paths start from. Brackets and stars are literal in `base` and in
    the names of existing files and folders. format: which files to use from a folder; None: every
    known format. Raises DataError if there is no file.
    """
    if _URL.match(name):
        raise DataError(
            "The path is a URL, but only local files are supported",
            where=name,
            fix="download the file and use its path; for a dataset on the Hugging Face Hub, use "
            "{kind: hub, dataset: ID}",
        )
    try:
        path = (base / Path(name).expanduser()).absolute()
        exists, is_folder = path.exists(), path.is_dir()
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: a user without a home
        raise _unusable_name(name, error) from error
    if is_folder:
        return _files_in(path, name, format)
    if exists:
        return [regular(path)]
    if not glob.has_magic(name):
        raise missing(path, _fix_of_unexpanded(name))
    start = next(parent for parent in path.parents if parent.is_dir())  # not part of the pattern
    matches = _matches(start, path.relative_to(start).parts)
    files = [match for match in sorted({*matches}) if _is_file(match)]
    if files:
        return files
    raise DataError("No file matches", where=path, fix="check the pattern and its folder")


def _fix_of_unexpanded(name: str) -> str | None:
    """The fix for a path with variables or braces that a shell would have expanded."""
    if "$" in name:
        return "write the path without variables: they are not expanded"
    if re.search(r"\{[^}]*,[^}]*\}", name):
        return "list each file as a separate source, or use * and [..]: braces are not expanded"
    return None


def _is_file(path: Path) -> bool:
    """Whether the path is a file. Raises DataError for a dangling link instead of skipping it."""
    if path.is_symlink() and not path.exists():
        raise missing(path)
    return path.is_file()


def _matches(start: Path, parts: tuple[str, ...]) -> Iterator[Path]:
    """The paths in and below a folder that match the parts of a pattern."""
    if "**" not in parts:
        yield from (start / match for match in glob.glob("/".join(parts), root_dir=start))
        return
    here = parts.index("**")
    tops = _matches(start, parts[:here]) if here else [start]
    for top in filter(Path.is_dir, tops):
        for folder, _ in _folders(top):
            yield from _matches(folder, parts[here + 1 :] or ("*",))


def _folders(top: Path) -> Iterator[tuple[Path, list[str]]]:
    """The folder and all folders below it, each with the names of its files.

    Hidden files and folders, and folders that are unreadable or vanish meanwhile, are skipped.
    Links to folders are followed last, and no folder is read twice, because links can form cycles.
    """
    seen: set[str] = set()
    tops = [str(top)]
    while tops:
        for folder, inside, names in os.walk(tops.pop()):
            real = os.path.realpath(folder)
            if real in seen:
                inside.clear()
                continue
            seen.add(real)
            inside[:] = [each for each in inside if not each.startswith(".")]
            tops += filter(os.path.islink, (os.path.join(folder, each) for each in inside))
            yield Path(folder), [name for name in names if not name.startswith(".")]


def files_with(folder: Path, endings: Sequence[str]) -> Iterator[Path]:
    """Files in and below a folder that have one of the endings, ignoring compression."""
    ends = tuple(end + packed for end in endings for packed in ("", *COMPRESSIONS))
    for inside, names in _folders(folder):
        for name in names:  # make few Path objects: a folder may have a million files
            if name.lower().endswith(ends):
                yield inside / name


def _files_in(folder: Path, name: str, format: FileFormat | None) -> list[Path]:
    endings = [end for end, known in FORMATS.items() if format in (None, known)]
    files = sorted(filter(_is_file, files_with(folder, endings)))
    if files:
        return files
    what = f"The folder has no {'known' if format is None else endings[0]} file"
    unread = unread_files(folder)
    if not unread:
        fix = "use a folder with files of a format in docs/data.md#files, or select the files by a "
        fix += f"pattern: path: {name.rstrip('/')}/*.EXT"
        raise DataError(what, where=folder, fix=fix)
    first = max(unread.values(), key=len)[0]
    pattern = f"{name.rstrip('/')}/**/*{extension_of(first)}"
    convert = conversion(first)
    fix = f"if they are plain text, select them by a pattern (kind: text): {pattern}"
    raise DataError(
        f"{what}, but {unread_summary(unread)}",
        where=folder,
        fix=fix if convert is None else f"for each file, {convert}",
    )


def unread_files(folder: Path) -> dict[str, list[Path]]:
    """Files in a folder that are not read, sorted, by extension.

    Excludes files of known formats, Markdown and similar files, and files without an extension.
    """
    found: dict[str, list[Path]] = {}
    for file in sorted(files_with(folder, ("",))):
        ending = extension_of(file)
        if ending and ending not in FORMATS and ending not in ALSO_TEXT and file.is_file():
            found.setdefault(ending, []).append(file)
    return found


def unread_summary(unread: Mapping[str, Sequence[Path]]) -> str:
    return ", ".join(f"{len(files):,} {ending}" for ending, files in unread.items())


def other_texts(folder: Path) -> list[Path]:
    """Files in a folder that are read as text only if they are named, sorted: Markdown and similar
    files, except those that describe the folder (README, LICENSE)."""
    return sorted(
        file
        for file in files_with(folder, ALSO_TEXT)
        if not _ABOUT.match(file.stem) and _is_file(file)
    )


def _unusable_name(name: str, error: Exception) -> DataError:
    shown = name if len(name) <= 80 else f"{name[:80]}..."
    reason = getattr(error, "strerror", None) or str(error)
    return DataError(f"The path {shown!r} cannot be used: {reason}", fix="check the path")

"""Parses a recipe's YAML into mappings, lists, and unconverted scalars, each with its line.

YAML 1.1, which PyYAML implements, reads `no` as false, `1:30` as 90, and `017` as 15 everywhere.
In a recipe, the meaning of an unquoted scalar depends on its key instead, so it stays `Plain` here
and `recipe_values` converts it.
"""

from __future__ import annotations

import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import yaml

from stillhouse.errors import RecipeError, shown

Key = tuple[str | int, ...]
Lines = dict[Key, int]

LARGEST_FILE = 1_000_000
"""Maximum size of a recipe in bytes; long texts belong in files that the recipe names."""
MOST_VALUES = 50_000
"""Maximum number of values in a recipe, with aliases expanded."""
DEEPEST = 64
"""Maximum nesting depth of mappings and lists."""

_UNPRINTABLE = re.compile("[^\t\n\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_UTF16 = (b"\xff\xfe", b"\xfe\xff")
_STR = "tag:yaml.org,2002:str"
_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class Plain(str):
    """An unquoted, unconverted scalar."""


@dataclass(slots=True)
class _Node:
    """A YAML node. value: a scalar, a list of nodes, or a mapping's nodes by key. size: the number
    of values in it, including those of aliases."""

    line: int
    value: str | list[_Node] | dict[str, _Node]
    size: int = 1


def read_file(path: Path) -> str:
    """Return the text of a recipe file. Raises RecipeError if it is not a text file or is too
    large.

    Only regular files are read: a pipe or a device might never end.
    """
    try:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            raise RecipeError(
                "the recipe is a folder", where=path, fix="pass the YAML file: folder/recipe.yaml"
            )
        if not stat.S_ISREG(status.st_mode):
            raise RecipeError(
                "the recipe is not a regular file", where=path, fix="write it to a file first"
            )
        if status.st_size > LARGEST_FILE:
            raise RecipeError(
                f"the recipe has {status.st_size:,} bytes, more than the maximum of "
                f"{LARGEST_FILE:,}",
                where=path,
                fix="pass the recipe itself, and move long texts to files that it names",
            )
        raw = path.read_bytes()
    except (OSError, ValueError) as error:
        if isinstance(error, FileNotFoundError | RecipeError):
            raise
        reason = getattr(error, "strerror", None) or error
        raise RecipeError(
            f"the recipe cannot be read: {reason}",
            where=repr(str(path))[1:-1],
            fix="check the path and its permissions",
        ) from None
    try:
        return raw.decode("utf-16" if raw.startswith(_UTF16) else "utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise RecipeError(
            f"the recipe is not UTF-8 text: byte {raw[error.start]:#04x} cannot be read",
            where=f"{path}, line {line}",
            fix="pass a YAML file that is saved as UTF-8",
        ) from None


def read_document(text: str, source: str) -> tuple[dict[str, Any], Lines]:
    """Parse YAML into mappings, lists, and scalars (`Plain` if unquoted), and each key's line.

    Raises RecipeError for invalid YAML, a document that is not a mapping, several documents, a
    repeated key, a tag, or an alias that contains itself or expands to too many values.
    """
    node = _compose(text, source)
    if node is None or not isinstance(node.value, dict):
        raise RecipeError(
            "the recipe is empty or not a mapping of keys to values",
            where=source,
            fix="start from recipes/demo.yaml",
        )
    lines: Lines = {}
    return _values(node, (), lines), lines


def read_scalar(text: str, source: str) -> Any:
    """Parse the value of an override into the types that `read_document` returns."""
    node = _compose(text, source)
    return Plain("") if node is None else _values(node, (), {})


def dotted(key: Key) -> str:
    """Format a key as a.b.0, printable and not too long."""
    return ".".join(shown(part) for part in key)


# --- nodes -----------------------------------------------------------------------------------


def _compose(text: str, source: str) -> _Node | None:
    if found := _UNPRINTABLE.search(text):
        raise RecipeError(
            f"the character U+{ord(found[0]):04X} is not allowed in YAML",
            where=_at(source, text.count("\n", 0, found.start()) + 1),
            fix="pass a YAML file saved as UTF-8; in double quotes, write \\x.. or \\u....",
        )
    try:
        return _Composer(text, source).document()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or str(error)
        raise RecipeError(
            f"the recipe is not valid YAML: {problem}",
            where=_at(source, mark.line + 1) if mark else source,
            fix="check the indentation (use spaces, not tabs), and quote values that contain ': ' "
            "or start with a symbol",
        ) from None


def _at(source: str, line: int) -> str:
    return source if source.startswith("--set") else f"{source}, line {line}"


@dataclass
class _Composer:
    """Composes nodes from PyYAML's events, because PyYAML's composer has no limits and can overflow
    the stack."""

    text: str
    source: str
    anchors: dict[str, _Node | None] = field(default_factory=dict)
    composed: int = 0

    def document(self) -> _Node | None:
        self.events: Iterator[Any] = iter(yaml.parse(self.text, Loader=_Loader))
        root: _Node | None = None
        for event in self.events:
            if isinstance(event, yaml.DocumentStartEvent):
                if root is not None:
                    self.reject(
                        event, "a second document begins", "keep one document, without `---`"
                    )
                root = self.node(next(self.events), 0)
        return root

    def reject(self, event: Any, what: str, fix: str) -> NoReturn:
        raise RecipeError(what, where=_at(self.source, event.start_mark.line + 1), fix=fix)

    def node(self, event: Any, depth: int) -> _Node:
        if depth > DEEPEST:
            problem = f"values are nested more than {DEEPEST} levels deep"
            self.reject(event, problem, "remove levels")
        if isinstance(event, yaml.AliasEvent):
            return self.alias(event)
        if event.tag not in (None, "!", _STR):
            self.reject(event, f"the tag {shown(event.tag)} is not supported", "remove it")
        if event.anchor is not None:
            self.anchors[event.anchor] = None
        node = self.untagged(event, depth)
        self.composed += 1
        if max(node.size, self.composed) > MOST_VALUES:
            self.reject(
                event,
                f"the recipe has more than {MOST_VALUES:,} values",
                "use fewer aliases (*), and move texts to files that the recipe names",
            )
        if event.anchor is not None:
            self.anchors[event.anchor] = node
        return node

    def alias(self, event: Any) -> _Node:
        if event.anchor not in self.anchors:
            problem = f"the anchor &{shown(event.anchor)} is not defined"
            self.reject(event, problem, "define it above")
        node = self.anchors[event.anchor]
        if node is None:
            self.reject(event, f"*{shown(event.anchor)} refers to itself", "write it out")
        return node

    def untagged(self, event: Any, depth: int) -> _Node:
        line = event.start_mark.line + 1
        if isinstance(event, yaml.ScalarEvent):
            written = event.tag is None and not event.style
            value = Plain(event.value) if written else str(event.value)
            if has_surrogate(value):
                self.reject(
                    event,
                    "the text contains half of a surrogate pair",
                    "write the complete character",
                )
            return _Node(line, value)
        if isinstance(event, yaml.SequenceStartEvent):
            items, size = [], 1
            while not isinstance(event := next(self.events), yaml.SequenceEndEvent):
                items.append(self.node(event, depth + 1))
                size += items[-1].size
            return _Node(line, items, size)
        return self.mapping(line, depth)

    def mapping(self, line: int, depth: int) -> _Node:
        """Compose a mapping. Merged keys (`<<`) do not replace the mapping's own keys."""
        values: dict[str, _Node] = {}
        merged: list[_Node] = []
        places: dict[str, int] = {}
        size = 1
        while not isinstance(event := next(self.events), yaml.MappingEndEvent):
            at = event.start_mark.line + 1
            name = self.node(event, depth + 1).value
            if not isinstance(name, str) or not name:
                self.reject(event, "a key is empty, a list or a mapping", "write a name")
            if name in places:
                raise RecipeError(
                    f"the key `{shown(name)}` is given twice",
                    where=f"{self.source}, lines {places[name]} and {at}",
                    fix="remove one of the two",
                )
            places[name] = at
            value = self.node(next(self.events), depth + 1)
            size += value.size
            if name == "<<" and isinstance(event, yaml.ScalarEvent) and not event.style:
                merged += value.value if isinstance(value.value, list) else [value]
                if not all(isinstance(one.value, dict) for one in merged):
                    self.reject(event, "<< merges a value that is not a mapping", "use a mapping")
            else:
                values[name] = _Node(at, value.value, value.size)
        for one in merged:
            assert isinstance(one.value, dict)
            values = {**one.value, **values}
        return _Node(line, values, size)


def has_surrogate(text: str) -> bool:
    """Whether the text contains half of a surrogate pair, which UTF-8 cannot encode."""
    return any("\ud800" <= character <= "\udfff" for character in text)


def _values(node: _Node, key: Key, lines: Lines) -> Any:
    """Convert nodes to values. No value is shared, so that an override changes only one place."""
    if isinstance(node.value, dict):
        for name, child in node.value.items():
            lines[(*key, name)] = child.line
        return {name: _values(child, (*key, name), lines) for name, child in node.value.items()}
    if isinstance(node.value, list):
        for index, child in enumerate(node.value):
            lines[(*key, index)] = child.line
        return [_values(child, (*key, index), lines) for index, child in enumerate(node.value)]
    return node.value

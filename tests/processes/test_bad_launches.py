"""A torchrun that cannot work ends with one error on each machine, which says what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import BloomConfig, BloomForCausalLM

from tests import tiny
from tests.processes.torchruns import agents, stderr_of

pytestmark = pytest.mark.processes


def few_windows(folder: Path) -> dict[str, Any]:
    return tiny.recipe(folder, data={"train_tokens": 64})


def few_rows(folder: Path) -> dict[str, Any]:
    """The number of windows is known only once the rows are tokenized."""
    raw = tiny.recipe(folder)
    rows = folder / "rows.jsonl"
    rows.write_text("".join(f'{{"text": "{name} sees a tree."}}\n' for name in ("she", "he", "it")))
    raw["data"]["heldout_sources"] = raw["data"]["sources"]
    raw["data"] |= {"sources": [{"kind": "jsonl", "path": str(rows)}], "train_tokens": None}
    return raw


def odd_batch(folder: Path) -> dict[str, Any]:
    return tiny.recipe(folder)


def uneven_nodes(folder: Path) -> dict[str, Any]:
    train = {"shard": "both", "shard_within": "node", "batch_size": 6}
    return tiny.recipe(folder, train=train)


def teacher_without_a_plan(folder: Path) -> dict[str, Any]:
    raw = tiny.recipe(folder, train={"shard": "teacher"})
    bloom_tokenizer = tiny.tokenizer()
    config = BloomConfig(vocab_size=len(bloom_tokenizer), hidden_size=32, n_layer=2, n_head=4)
    BloomForCausalLM(config).save_pretrained(folder / "bloom")
    bloom_tokenizer.save_pretrained(folder / "bloom")
    raw["teacher"]["model"] = str(folder / "bloom")
    tiny.llama(num_hidden_layers=1).config.save_pretrained(folder / "small")
    raw["student"] = {"start": "random", "config": str(folder / "small")}
    return raw


# case: (recipe, processes of each machine, the problem, the fix)
CASES = {
    "more processes than windows": (
        few_windows,
        (4,),
        "4 processes cannot share at most 3 windows",
        "use at most 3 processes",
    ),
    "more processes than windows of a short text": (
        few_rows,
        (4,),
        "4 processes cannot share 2 windows",
        "use at most 2 processes",
    ),
    "a batch that cannot be divided": (
        odd_batch,
        (3,),
        "train.batch_size 4 is not a multiple of micro_batch_size 1 x 3 processes",
        "use a multiple of 3",
    ),
    "nodes of different sizes": (
        uneven_nodes,
        (1, 2),
        "nodes have different numbers of processes (1 and 2)",
        "start the same number of processes on every node",
    ),
    "a teacher without a plan": (
        teacher_without_a_plan,
        (2,),
        "transformers has no plan to shard BloomForCausalLM",
        "use train.shard: student or none",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_each_machine_reports_one_error_and_its_fix(tmp_path: Path, name: str) -> None:
    recipe, each, problem, fix = CASES[name]
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe(tmp_path)))
    nodes = agents(path, [tmp_path] * len(each), each)
    said = [stderr_of(node) for node in nodes]
    assert [node.returncode for node in nodes] == [1] * len(each)
    assert [one.count("error: ") for one in said] == [1] * len(each), said
    # Of several machines, only the main process's may know the cause.
    assert problem in "".join(said)
    assert fix in "".join(said)
    assert "this is a bug" not in "".join(said)
    finished = [stage.name.partition("-")[0] for stage in tmp_path.glob("run/stages/[a-z]*")]
    assert finished == (["data"] if recipe is few_rows else [])

"""`stillhouse plan` estimates a run on other machines from the models' configurations alone."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner, Result

from stillhouse import cli
from stillhouse.errors import ModelError, RecipeError
from stillhouse.number_format import seconds, size
from stillhouse.plan import RunPlan, described_machine, plan_recipe
from stillhouse.planning.machine import Machine
from tests import tiny
from tests.planning.shapes import LLAMA_8B, LLAMA_70B

pytestmark = pytest.mark.run

GPUS = ("--gpus", "8", "--gpu-memory", "80GB")


def config_folder(folder: Path, **sizes: Any) -> str:
    """A folder that contains only a config.json."""
    tiny.llama_config(**sizes).save_pretrained(folder)
    assert [file.name for file in folder.iterdir()] == ["config.json"]
    return str(folder)


def recipe(folder: Path, **sections: Any) -> dict[str, Any]:
    raw: dict[str, Any] = {
        "name": "planned",
        "folder": str(folder / "run"),
        "teacher": {"model": config_folder(folder / "teacher", num_hidden_layers=4)},
        "student": {"start": "pruned", "ffn_size": 32},
        "data": {
            "sources": [{"kind": "hub", "dataset": "org/text"}],
            "context": 64,
            "train_tokens": 1_000_000,
        },
        "train": {"batch_size": 16},
    }
    for name, section in sections.items():
        raw[name] = {**raw.get(name, {}), **section} if isinstance(section, dict) else section
    return raw


def written(folder: Path, **sections: Any) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe(folder, **sections)))
    return path


def planned(folder: Path, machine: Machine | None = None, **sections: Any) -> RunPlan:
    machine = machine or Machine("cuda", 80e9, per_node=8, rate=4e14, price=2.5)
    return plan_recipe(written(folder, **sections), machine)


def call(*arguments: str) -> Result:
    return CliRunner().invoke(cli.app, ["plan", *arguments])


def test_the_command_shows_every_stage_and_writes_the_figures(tmp_path: Path) -> None:
    path, out = written(tmp_path), tmp_path / "plan.json"
    prices = ("--rate", "400", "--price-per-hour", "2.5", "--json", str(out))
    result = call(str(path), *GPUS, *prices)
    assert result.exit_code == 0, result.output
    shown = result.output.replace("\u00a0", " ")
    for text in ("8 GPUs with 80.0 GB", "train", "evaluate", "context 1.50 GB", "network: each"):
        assert text in shown
    figures = json.loads(out.read_text())
    assert [stage["name"] for stage in figures["stages"]] == [
        "data",
        "student",
        "train",
        "evaluate",
        "export",
    ]
    train = figures["stages"][2]
    assert train["memory_bytes"] == sum(train["memory"]["parts"].values())
    assert figures["fits"]


def test_time_and_cost_follow_from_the_rate_and_the_price(tmp_path: Path) -> None:
    plan = planned(tmp_path)
    train = next(stage for stage in plan.stages if stage.name == "train")
    assert train.tokens == 977 * 16 * 64  # 15,625 windows, the last step not full
    assert train.seconds(plan.machine) == pytest.approx((train.flops or 0) / (8 * 4e14))
    hours = (train.seconds(plan.machine) or 0) / 3600
    assert train.dollars(plan.machine) == pytest.approx(hours * 8 * 2.5)


def test_without_a_rate_the_command_says_how_to_get_the_time(tmp_path: Path) -> None:
    result = call(str(written(tmp_path)), *GPUS)
    assert "time: pass --rate" in result.output


def test_stored_signals_leave_the_teacher_out_of_training(tmp_path: Path) -> None:
    live = planned(tmp_path)
    stored = planned(tmp_path, signals={"encoding": {"kind": "top_k", "k": 8}})
    parts = {
        name: next(stage.memory.parts for stage in plan.stages if stage.name == "train")
        for name, plan in (("live", live), ("stored", stored))
    }
    assert "teacher" in parts["live"]
    assert "teacher" not in parts["stored"]
    assert "signals" in [stage.name for stage in stored.stages]
    assert stored.disk > live.disk


def test_every_member_of_a_family_is_planned(tmp_path: Path) -> None:
    hops = [{"name": "wide", "ffn_size": 48}, {"name": "narrow", "layers": 2}]
    cascade = {"hops": hops, "teacher": "both"}
    plan = planned(tmp_path, student={"start": "pruned"} | {"ffn_size": None}, cascade=cascade)
    names = [stage.name for stage in plan.stages]
    assert names.count("data") == 1
    assert [name for name in names if name.endswith("train")] == ["wide train", "narrow train"]
    wide, narrow = (stage for stage in plan.stages if stage.name.endswith("train"))
    assert narrow.memory.parts["teacher"] > wide.memory.parts["teacher"]  # two teachers
    assert narrow.memory.parts["moments"] < wide.memory.parts["moments"]


def test_a_familys_teacher_is_measured_once(tmp_path: Path) -> None:
    hops = [{"name": "wide", "ffn_size": 48}, {"name": "narrow", "layers": 2}]
    student = {"start": "pruned", "ffn_size": None}
    plan = planned(tmp_path, student=student, cascade={"hops": hops})
    assert [stage.name for stage in plan.stages].count("teacher") == 1
    family, alone = (
        next(stage for stage in each.stages if stage.name.endswith("evaluate"))
        for each in (plan, planned(tmp_path, student={"start": "pruned", "ffn_size": 48}))
    )
    assert (family.flops or 0) < (alone.flops or 0)


def test_pruning_on_many_processes_takes_less_memory_each(tmp_path: Path) -> None:
    parts = []
    for processes in (1, 4):
        machine = Machine("cuda", 80e9, per_node=processes)
        plan = planned(tmp_path, machine, student={"start": "pruned", "ffn_size": 48})
        (student,) = (stage for stage in plan.stages if stage.name == "student")
        assert student.processes == processes
        parts.append(student.memory.parts)
    assert parts[1]["calibration"] == parts[0]["calibration"] / 4
    assert parts[1]["moments"] == parts[0]["moments"]
    assert parts[1]["weights"] == parts[0]["weights"]


def test_a_model_larger_than_a_gpu_is_pruned_by_layer_or_on_the_cpu(tmp_path: Path) -> None:
    found = []
    for importance in ("refit", "gradients"):
        student = {"start": "pruned", "ffn_size": 48, "importance": importance}
        whole = planned(tmp_path, Machine("cuda", 80e9), student=student)
        (all_layers,) = (stage for stage in whole.stages if stage.name == "student")
        smaller = Machine("cuda", all_layers.memory.total - 1)
        plan = planned(tmp_path, smaller, student=student)
        (by_layer,) = (stage for stage in plan.stages if stage.name == "student")
        found.append((all_layers.note, by_layer.note))
        if importance == "refit":
            assert by_layer.memory.parts["weights"] < all_layers.memory.parts["weights"]
    assert found == [("", "a layer at a time"), ("", "on the CPU")]


def test_a_search_needs_the_memory_to_train_a_candidate(tmp_path: Path) -> None:
    student: dict[str, Any] = {"start": "pruned", "ffn_size": None, "target": {"params": "60%"}}
    found = {}
    for trained in (0, 4):
        student["search"] = {"trained": trained}
        batch = {"batch_size": 512}
        plan = planned(tmp_path, Machine("cuda", 80e9), student=student, train=batch)
        (found[trained],) = (stage for stage in plan.stages if stage.name == "search")
    assert found[0].memory.phase == "pruning"
    assert found[4].memory.phase == "training a candidate"
    assert found[4].memory.total > found[0].memory.total
    assert found[4].memory.parts["teacher's rows and head"] > 0
    assert found[4].scratch > found[0].scratch


def test_sharding_over_a_node_keeps_its_traffic_there(tmp_path: Path) -> None:
    machine = Machine("cuda", 80e9, per_node=4, nodes=2)
    crossing = {}
    for within in ("all", "node"):
        train = {"shard": "both", "shard_within": within, "batch_size": 16}
        plan = planned(tmp_path, machine, train=train)
        crossing[within] = sum(stage.between_nodes for stage in plan.stages)
    assert 0 < crossing["node"] < crossing["all"] / 4


@pytest.mark.parametrize(("generator", "shard"), [("local", "both"), ("vllm", "teacher")])
def test_a_student_that_generates_in_vllm_is_not_sharded(
    tmp_path: Path, generator: str, shard: str
) -> None:
    train = {"batch_size": 16, "on_policy": {"generator": {"kind": generator}}}
    plan = planned(tmp_path, Machine("cuda", 1.0, per_node=8), train=train)  # nothing fits
    notes = [stage.note for stage in plan.stages if stage.name == "train"]
    assert notes[0].endswith(f"sharded: {shard}")


# --- what does not fit -----------------------------------------------------------------------

LARGE = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 16}


def train_fix(folder: Path, memory: float, processes: int = 1, **train: Any) -> str | None:
    """The advice for training 210M parameters with 32 x 1,024 tokens per micro-batch."""
    machine = Machine("cuda", memory, per_node=processes)
    plan = planned(
        folder,
        machine,
        teacher={"model": config_folder(folder / "large", **LARGE)},
        student={"ffn_size": 3072},
        data={"context": 1024},
        train={"batch_size": 32, **train},
    )
    return next(stage.fix for stage in plan.stages if stage.name == "train")


def test_the_cheapest_change_is_suggested_and_works(tmp_path: Path) -> None:
    assert train_fix(tmp_path, 80e9) is None
    assert train_fix(tmp_path, 20e9) == "set train.micro_batch_size: 8"
    assert train_fix(tmp_path, 20e9, micro_batch_size=8) is None
    with_one = train_fix(tmp_path, 7e9, micro_batch_size=1)
    assert with_one == "set train.gradient_checkpointing: true"
    assert train_fix(tmp_path, 7e9, micro_batch_size=1, gradient_checkpointing=True) is None


def test_more_gpus_are_suggested_if_no_change_is_enough(tmp_path: Path) -> None:
    advice = train_fix(tmp_path, 3.5e9, micro_batch_size=1)
    assert advice is not None
    assert "GPUs" in advice


def test_the_command_fails_if_something_does_not_fit(tmp_path: Path) -> None:
    result = call(str(written(tmp_path)), "--gpu-memory", "1GB")
    assert result.exit_code == 1
    assert "train does not fit" in result.output


# --- what cannot be planned ------------------------------------------------------------------


@pytest.mark.parametrize("memory", ["80", "lots", "60%", "-1GB", "0GB"])
def test_memory_needs_a_unit(memory: str) -> None:
    with pytest.raises(RecipeError, match="not an amount of memory") as found:
        described_machine(8, memory, 1, None, None)
    assert "80GB" in str(found.value)


def test_more_processes_than_windows_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="8 processes cannot share 5 windows"):
        planned(tmp_path, data={"train_tokens": 300}, train={"batch_size": 8})


def test_text_of_unknown_length_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="number of training tokens is unknown") as found:
        planned(tmp_path, data={"train_tokens": None})
    assert "train_tokens" in str(found.value)


def test_a_dataset_next_to_a_file_is_not_counted_as_empty(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("some words " * 10_000)
    sources = [{"kind": "text", "path": "text.txt"}, {"kind": "hub", "dataset": "org/text"}]
    assert planned(tmp_path, data={"sources": sources}).tokens == 1_000_000
    with pytest.raises(RecipeError, match="number of training tokens is unknown"):
        planned(tmp_path, data={"sources": sources, "train_tokens": None})
    limited = [sources[0], {**sources[1], "tokens": 50_000}]
    found = planned(tmp_path, data={"sources": limited, "train_tokens": None})
    assert 50_000 < found.tokens < 75_000


def test_a_folder_without_a_configuration_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"no config\.json"):
        planned(tmp_path, teacher={"model": str(tmp_path / "empty")})


def test_an_unknown_architecture_is_an_error(tmp_path: Path) -> None:
    folder = tmp_path / "unknown"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "no-such-architecture"}')
    with pytest.raises(ModelError, match="cannot read this model's config"):
        planned(tmp_path, teacher={"model": str(folder)})


def test_a_task_cannot_be_planned(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("task: {kind: classify, labels: [a, b]}\n")
    with pytest.raises(RecipeError):
        plan_recipe(path, Machine("cuda", 80e9))


PAGE = Path(__file__).parents[1] / "docs" / "scale.md"


def documented_commands() -> list[str]:
    return re.findall(r"^ *stillhouse plan (.*)$", PAGE.read_text("utf-8"), re.MULTILINE)


def test_the_commands_of_the_documentation_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = documented_commands()
    assert len(commands) > 3
    written(tmp_path, train={"batch_size": 64})
    monkeypatch.chdir(tmp_path)
    for line in commands:
        result = call(*shlex.split(line))
        assert result.exit_code == 0, result.output


@pytest.mark.slow
def test_the_documented_figures_are_those_of_the_commands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = PAGE.read_text("utf-8")
    (block,) = re.findall(r"^```yaml\n(name: llama-8b.*?)^```", text, re.MULTILINE | re.DOTALL)
    (tmp_path / "recipe.yaml").write_text(block)
    models = yaml.safe_load(block)
    monkeypatch.chdir(tmp_path)
    LLAMA_70B.save_pretrained(models["teacher"]["model"])
    LLAMA_8B.save_pretrained(models["student"]["model"])
    for line in documented_commands()[1:]:
        out = tmp_path / "plan.json"
        assert call(*shlex.split(line), "--json", str(out)).exit_code == 0
        figures = json.loads(out.read_text())
        (train,) = (stage for stage in figures["stages"] if stage["name"] == "train")
        nodes = "4" if "--nodes 4" in line else "1"
        within = "`node`" if "within=node" in line else "`all`" if nodes == "4" else ""
        amounts = [size(train["memory_bytes"]), seconds(train["seconds"]), size(train["network"])]
        amounts.append(size(train["between_nodes"]) if nodes == "4" else "")
        row = " | ".join([nodes, within, *amounts]).replace("\u00a0", " ")
        assert re.sub(" +", " ", f"| {row} |") in re.sub(" +", " ", text), row

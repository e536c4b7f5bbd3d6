"""If the processes of a torchrun cannot work together, each reports one error with a fix."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import BloomConfig

from stillhouse import processes
from stillhouse.config.load_recipe import parse_recipe
from stillhouse.errors import DeviceError, ModelError, RecipeError
from stillhouse.family.family import FAMILY
from stillhouse.hardware import choose_precision, device_kind
from stillhouse.language_model.data_stage import open_data, plan_data
from stillhouse.language_model.job import find_models
from stillhouse.language_model.run_check import (
    ready_to_train,
    require_processes,
    require_resources,
    require_text_for_all,
)
from stillhouse.language_model.run_models import RunModels, run_models
from stillhouse.pipeline.engine import locked_folder
from stillhouse.pipeline.stage_plan import doing
from stillhouse.processes import open_group, shard, sharding_mesh, shards_in_node
from stillhouse.training.train import require_windows
from tests import forks, tiny
from tests.forks import ranks

GPUS = ("NVIDIA A100-SXM4-80GB with 79 GiB", "NVIDIA GeForce RTX 4090 with 24 GiB")


def open_with(out: Path, kinds: tuple[str, str]) -> None:
    """Open the group with this process's GPU of `kinds`, and write the error, if any, to `out`."""
    rank = os.environ["RANK"]
    forks.patch(processes, "device_kind", lambda device: kinds[int(rank)])
    try:
        open_group()
    except DeviceError as error:
        (out / rank).write_text(str(error))


@pytest.mark.run
@pytest.mark.parametrize("mixed", [True, False])
def test_different_gpus_are_one_error_in_every_process(tmp_path: Path, mixed: bool) -> None:
    kinds = GPUS if mixed else (GPUS[0], GPUS[0])
    for process in ranks(2, open_with, tmp_path, kinds):
        assert process.wait(timeout=60) == 0, process.communicate()[1][-2000:]
    said = [file.read_text() for file in sorted(tmp_path.iterdir())]
    if not mixed:
        assert said == []
        return
    assert len(said) == 2
    assert said[0] == said[1]
    assert all(gpu in said[0] for gpu in GPUS)
    assert "CUDA_VISIBLE_DEVICES" in said[0]


def test_cpus_are_equal_if_they_choose_the_same_precision() -> None:
    device = torch.device("cpu")
    dtype = str(choose_precision("auto", device).dtype).removeprefix("torch.")
    assert device_kind(device) == f"a CPU for {dtype}"


def test_more_processes_than_windows_are_rejected() -> None:
    require_windows(8, 8)
    with pytest.raises(RecipeError, match="8 processes cannot share 7 windows") as caught:
        require_windows(7, 8)
    assert "at most 7 processes" in str(caught.value.fix)


def test_sharding_within_nodes_requires_nodes_of_equal_size(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "7")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    monkeypatch.setattr(processes, "_node_sizes", {3, 4})
    assert shards_in_node(within_node=False) == 7
    with pytest.raises(RecipeError, match="numbers of processes \\(3 and 4\\)") as caught:
        shards_in_node(within_node=True)
    assert "same number of processes on every node" in str(caught.value.fix)


def planned(folder: Path, **train: object) -> RunModels:
    return run_models(find_models(tiny.parsed(tiny.recipe(folder, train=train)), folder))


def test_processes_are_checked_before_anything_is_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    require_processes(planned(tmp_path, shard="both"))
    with pytest.raises(RecipeError, match="batch_size 3 is not a multiple of") as caught:
        require_processes(planned(tmp_path, batch_size=3))
    assert caught.value.fix == "use a multiple of 2"
    unplanned = BloomConfig(vocab_size=tiny.llama_config().vocab_size, n_layer=1, n_head=2)
    models = replace(planned(tmp_path, shard="teacher"), teacher=unplanned)
    with pytest.raises(ModelError, match="no plan to shard BloomForCausalLM") as unsharded:
        require_processes(models)
    assert "train.shard: student or none" in str(unsharded.value.fix)
    require_processes(replace(models, recipe=planned(tmp_path, shard="student").recipe))
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setattr(processes, "_node_sizes", {1, 3})
    require_processes(planned(tmp_path, shard="both"))
    with pytest.raises(RecipeError, match="numbers of processes \\(1 and 3\\)"):
        require_processes(planned(tmp_path, shard="both", shard_within="node"))


def few_tokens(folder: Path, monkeypatch: pytest.MonkeyPatch, **data: object) -> str:
    """The error of 4 processes with 64 tokens in windows of 32; empty if there is none."""
    monkeypatch.setenv("WORLD_SIZE", "4")
    raw = tiny.recipe(folder, data={"train_tokens": 64, **data})
    try:
        require_processes(run_models(find_models(tiny.parsed(raw), folder)))
    except RecipeError as error:
        return str(error)
    return ""


def test_too_few_tokens_are_rejected_before_anything_is_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = few_tokens(tmp_path, monkeypatch)
    assert "4 processes cannot share at most 3 windows" in found
    assert "use at most 3 processes" in found
    # Rows that are not cut, or not packed, may fill more windows.
    rows = [{"kind": "jsonl", "path": "rows.jsonl"}]
    assert few_tokens(tmp_path, monkeypatch, sources=rows) == ""
    assert few_tokens(tmp_path, monkeypatch, packing="none") == ""


@pytest.mark.parametrize("text", [None, 64])
def test_too_few_windows_stop_a_run_before_its_student(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: int | None
) -> None:
    """Even if the recipe does not set the number of tokens."""
    raw = tiny.recipe(tmp_path, data={"train_tokens": text, "context": 32}, folder=str(tmp_path))
    job = find_models(tiny.parsed(raw), tmp_path)
    with locked_folder(job.recipe) as folder:
        stages = {"data": doing(folder)(plan_data(job))}
    windows = len(open_data(stages["data"])[0])
    monkeypatch.setenv("WORLD_SIZE", str(windows + 1))
    with pytest.raises(RecipeError, match=f"{windows + 1} processes cannot share {windows} window"):
        ready_to_train(job, stages)
    # If the training is finished, its windows were enough.
    (tmp_path / "stages" / "train-0").mkdir()
    require_text_for_all(job.recipe, job.recipe.train, stages["data"])


def test_training_from_scratch_needs_windows_for_all_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hops = [{"name": "one", "ffn_size": 48}]
    cascade = {"hops": hops, "from_scratch": {"tokens": 64}}
    raw = tiny.recipe(tmp_path, cascade=cascade, folder=str(tmp_path / "run"))
    del raw["student"]["ffn_size"]
    recipe = parse_recipe(raw)
    job = FAMILY.find_to_check(recipe, tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(RecipeError, match="4 processes cannot share at most 3 windows"):
        list(require_resources(job, find=lambda job: []))


def shards_without_blocks(out: Path) -> None:
    model = nn.Linear(4, 4)
    try:
        shard(model, model, sharding_mesh(2))
    except RecipeError as error:
        (out / os.environ["RANK"]).write_text(str(error))


@pytest.mark.run
def test_a_student_with_unknown_decoder_blocks_cannot_be_sharded(tmp_path: Path) -> None:
    for process in ranks(2, shards_without_blocks, tmp_path):
        assert process.wait(timeout=60) == 0, process.communicate()[1][-2000:]
    for rank in range(2):
        said = (tmp_path / str(rank)).read_text()
        assert "does not name its decoder blocks" in said
        assert "train.shard: none" in said

"""A sharded student is saved layer by layer, and never more than one layer is gathered."""

from __future__ import annotations

import json
import weakref
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from stillhouse.launch import leads
from stillhouse.pruning import offload
from stillhouse.students.student import Student
from stillhouse.teachers.write_by_layer import weights_by_layer, write_by_layer
from stillhouse.training import distillation
from stillhouse.training.sharded_checkpoint import gathered_weights
from tests import forks
from tests.teachers.toys import tiny_model
from tests.training.conftest import Setting
from tests.training.test_sharding import in_processes, run

pytestmark = pytest.mark.run
SHARDED: dict[str, Any] = {"shard": "student", "max_steps": 2, "micro_batch_size": 2}


def saved(setting: Setting, out: Path, *, killed_at: int | None = None) -> None:
    """Trains and saves as if every model were large. killed_at: the part at which the main process
    is interrupted."""
    offload.LARGE_BYTES = 0
    alive = most = 0

    def gone(size: int) -> None:
        nonlocal alive
        alive -= size

    def counted(model: Any, parts: Any) -> Iterator[dict[str, Tensor]]:
        nonlocal alive, most
        left = killed_at
        for found in gathered_weights(model, parts):
            if leads() and left is not None:
                if left == 0:
                    raise KeyboardInterrupt
                left -= 1
            for tensor in found.values():
                alive += tensor.nbytes
                weakref.finalize(tensor, gone, tensor.nbytes)
            most = max(most, alive)
            yield found
            del found

    forks.patch(distillation, "gathered_weights", counted)
    run(setting, out, **SHARDED)
    if leads():
        (out / "most").write_text(str(most))


def stored(folder: Path) -> dict[str, Tensor]:
    return {
        name: value for f in folder.glob("*.safetensors") for name, value in load_file(f).items()
    }


def largest_part(model: Any) -> int:
    weights = dict(model.named_parameters())  # tied weights once
    return max(
        sum(weights[name].nbytes for name in names if name in weights)
        for _, names in weights_by_layer(model)
    )


def in_two(setting: Setting, out: Path, **options: Any) -> list[int]:
    ranks = forks.ranks(2, partial(saved, setting, out, **options))
    return [rank.wait(timeout=300) for rank in ranks]


def test_weights_equal_those_of_one_file_and_at_most_one_part_is_gathered(
    narrow: Setting, tmp_path: Path
) -> None:
    in_processes(2, narrow, tmp_path / "file", **SHARDED)
    assert in_two(narrow, tmp_path / "layers") == [0, 0]
    expected = load_file(tmp_path / "file" / "model" / "model.safetensors")
    folder = tmp_path / "layers" / "model"
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert index.keys() == expected.keys() == stored(folder).keys()
    for name, value in stored(folder).items():
        assert torch.equal(value, expected[name]), name
    model = Student.load(folder).model
    assert len(set(index.values())) == model.config.num_hidden_layers + 1
    assert int((tmp_path / "layers" / "most").read_text()) == largest_part(model)


def test_an_interrupted_save_leaves_no_model_and_is_repeated(
    narrow: Setting, tmp_path: Path
) -> None:
    assert in_two(narrow, tmp_path, killed_at=1) != [0, 0]
    assert (tmp_path / "unfinished-model").is_dir()
    assert not (tmp_path / "model").exists()
    assert in_two(narrow, tmp_path) == [0, 0]
    assert not (tmp_path / "unfinished-model").exists()
    Student.load(tmp_path / "model")


def test_each_part_is_freed_before_the_next_is_made(tmp_path: Path) -> None:
    model = tiny_model()
    made: list[weakref.ref[Tensor]] = []

    def parts() -> Iterator[dict[str, Tensor]]:
        weights = model.state_dict()
        for _, names in weights_by_layer(model):
            assert all(ref() is None for ref in made)
            part = {name: weights[name].clone() for name in names}
            made.extend(map(weakref.ref, part.values()))
            yield part
            del part

    write_by_layer(model, tmp_path, parts())
    assert made
    assert stored(tmp_path).keys() == {name for name, _ in model.named_parameters()}

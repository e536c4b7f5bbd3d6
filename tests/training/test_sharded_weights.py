"""Loading a sharded student: each process reads only its own part."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from transformers import Qwen3MoeConfig

from stillhouse.processes import local_part, part_like, shard, sharding_mesh
from stillhouse.students.random_student import random_model
from stillhouse.students.student import Student
from stillhouse.teachers.load_model import load_model
from stillhouse.teachers.planned_model import model_without_weights
from stillhouse.training import sharded_checkpoint
from stillhouse.training.sharded_checkpoint import read_weights
from tests import forks, tiny

CPU = torch.device("cpu")


class Allocations(TorchDispatchMode):
    """Measures the largest tensor on the CPU that receives values within the context.

    Empty tensors, which replace weights on the meta device, do not count.
    """

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        empty = (torch.ops.aten.empty.memory_format, torch.ops.aten.detach.default)
        written = func not in empty and not func.is_view
        if written and isinstance(made, Tensor) and made.device == CPU:
            own = made._local_tensor if isinstance(made, DTensor) else made
            self.largest = max(self.largest, own.nbytes)
        return made


class Slices:
    """A safetensors file that counts the bytes read, and offers only slices of tensors."""

    read = 0

    def __init__(self, *args: Any, **more: Any) -> None:
        self.file = safe_open(*args, **more)

    def __enter__(self) -> Slices:
        return self

    def __exit__(self, *args: object) -> None:
        pass

    def get_slice(self, name: str) -> Any:
        stored = self.file.get_slice(name)

        class Counted:
            def __getitem__(self, rows: Any) -> Tensor:
                with _disable_current_modes():  # the file is mapped as one tensor
                    found: Tensor = stored[rows]
                Slices.read += found.nbytes
                return found

        return Counted()


def sharded(folder: Path, *, rows: int | None = None) -> Any:
    """A folder's model, sharded over two processes. rows: the number of embedding rows to keep."""
    student = Student.without_weights(folder)
    if rows is not None:
        student.vocabulary = rows
        student.cut_rows_without_tokens()
    model: Any = student.model
    shard(model, model, sharding_mesh(2))
    read_weights(model, model, folder)
    return model


def compare(folder: Path, *, rows: int | None = None) -> None:
    """Asserts that this process has its part of the weights that are loaded without sharding."""
    model, whole = sharded(folder, rows=rows), load_model(folder, dtype=torch.float32)
    expected = whole.state_dict() | dict(whole.named_buffers())
    for name, found in [*model.named_parameters(), *model.named_buffers()]:
        value = expected[name][: found.shape[0]] if rows and found.dim() else expected[name]
        part = part_like(value, found)
        assert torch.equal(local_part(found.detach()), part), name
    assert model.generation_config.to_dict() == whole.generation_config.to_dict()


def reads_its_part(folder: Path) -> None:
    forks.patch(sharded_checkpoint, "safe_open", Slices)
    with Allocations() as made:
        model = sharded(folder)
    own = [local_part(each.detach()) for each in model.parameters()]
    assert Slices.read == sum(part.nbytes for part in own)
    assert made.largest <= max(part.nbytes for part in own)


def in_two_processes(work: Any) -> None:
    for rank in forks.ranks(2, work):
        assert rank.wait(timeout=120) == 0, rank.communicate()[1][-3000:]


@pytest.mark.run
@pytest.mark.parametrize("tied", [True, False])
def test_each_process_has_its_part_of_the_loaded_weights(tmp_path: Path, tied: bool) -> None:
    folder = tiny.save_model(tmp_path / "model", seed=1, tie_word_embeddings=tied)
    in_two_processes(partial(compare, folder))


@pytest.mark.run
def test_rows_without_tokens_are_not_read(tmp_path: Path) -> None:
    """The parts of a shorter table have different boundaries."""
    folder = tiny.save_model(tmp_path / "model", seed=1)
    rows = load_model(folder, dtype=torch.float32).config.vocab_size
    in_two_processes(partial(compare, folder, rows=rows - 5))


@pytest.mark.run
def test_a_process_reads_and_allocates_no_more_than_its_part(tmp_path: Path) -> None:
    folder = tiny.save_model(tmp_path / "model", seed=1)
    in_two_processes(partial(reads_its_part, folder))


@pytest.mark.run
def test_weights_that_must_be_converted_are_sent_by_the_main_process(tmp_path: Path) -> None:
    """The files of this mixture of experts have a tensor per expert; the model has a stack."""
    config = Qwen3MoeConfig(
        vocab_size=260,
        hidden_size=32,
        intermediate_size=48,
        moe_intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
    )
    folder = tmp_path / "model"
    random_model(config, seed=0).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    in_two_processes(partial(compare, folder))


def test_a_model_without_weights_has_its_buffers_and_ties(tmp_path: Path) -> None:
    folder = tiny.save_model(tmp_path / "model", seed=1, tie_word_embeddings=True)
    model, whole = model_without_weights(folder), load_model(folder, dtype=torch.float32)
    assert all(each.is_meta for each in model.parameters())
    assert model.lm_head.weight is model.model.embed_tokens.weight
    for name, buffer in whole.named_buffers():
        assert torch.equal(model.get_buffer(name), buffer), name
    assert not model.training


def test_rows_beyond_the_models_are_not_read(tmp_path: Path) -> None:
    save_file({"weight": torch.arange(12.0).view(6, 2)}, tmp_path / "file.safetensors")
    weight = torch.zeros(4, 2)
    with safe_open(tmp_path / "file.safetensors", framework="pt") as file:
        sharded_checkpoint._read(
            nn.Parameter(weight, requires_grad=False), file.get_slice("weight")
        )
    assert weight.tolist() == torch.arange(8.0).view(4, 2).tolist()

"""Weights that are mapped from their files can be dropped from memory without other effects."""

from __future__ import annotations

import mmap
import os
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from stillhouse.teachers.mapped_weights import MappedWeights, map_weights

PAGES = Path("/proc/self/pagemap")
pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or not os.access(PAGES, os.R_OK),
    reason="needs a readable /proc/self/pagemap",
)
WIDTH = 512


def resident_pages(tensors: Iterable[Tensor]) -> int:
    """How many pages of the tensors are in this process's memory."""
    found = 0
    with PAGES.open("rb", buffering=0) as file:
        for tensor in tensors:
            first = tensor.data_ptr() // mmap.PAGESIZE
            after = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE
            file.seek(8 * first)
            entries = np.frombuffer(file.read(8 * (after - first)), np.uint64)
            found += int((entries >> np.uint64(63)).sum())
    return found


def pages(tensor: Tensor) -> int:
    return tensor.nbytes // mmap.PAGESIZE


@pytest.fixture
def model(tmp_path: Path) -> nn.Sequential:
    """Two layers of 1 MiB each, saved in `tmp_path`."""
    made = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(2))).requires_grad_(False)
    save_file(made.state_dict(), tmp_path / "model.safetensors", metadata={"format": "pt"})
    return made


def weight(model: nn.Sequential, layer: int) -> Tensor:
    found = model[layer].weight
    assert isinstance(found, Tensor)
    return found


def mapped(model: nn.Sequential, folder: Path) -> dict[nn.Module, MappedWeights]:
    return map_weights(model, model, [folder / "model.safetensors"])


def test_released_pages_leave_memory_and_are_read_again(
    model: nn.Sequential, tmp_path: Path
) -> None:
    values = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    first, second = mapped(model, tmp_path).values()
    model(torch.ones(WIDTH))
    assert resident_pages([weight(model, 0)]) >= pages(weight(model, 0)) - 1
    first.release()
    assert resident_pages([weight(model, 0)]) <= 1  # the page in which the bias begins
    assert resident_pages([weight(model, 1)]) >= pages(weight(model, 1)) - 1, (
        "the other layer stays"
    )
    second.release()
    assert all(torch.equal(tensor, values[name]) for name, tensor in model.state_dict().items())


def test_a_changed_weight_keeps_its_values(model: nn.Sequential, tmp_path: Path) -> None:
    layer, _ = mapped(model, tmp_path).values()
    weight(model, 0)[3, 4] = -1.0
    model(torch.ones(WIDTH))
    layer.release()
    assert weight(model, 0)[3, 4] == -1.0
    assert resident_pages([weight(model, 0)]) >= pages(weight(model, 0)) - 1


def test_the_file_is_never_written(model: nn.Sequential, tmp_path: Path) -> None:
    before = (tmp_path / "model.safetensors").read_bytes()
    mapped(model, tmp_path)
    weight(model, 1).zero_()
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_weights_that_differ_from_the_file_are_not_mapped(
    model: nn.Sequential, tmp_path: Path
) -> None:
    weight(model, 0)[3, 4] = -1.0
    own = weight(model, 0).data_ptr(), weight(model, 1).data_ptr()
    layers = mapped(model, tmp_path)
    assert weight(model, 0).data_ptr() == own[0]
    assert weight(model, 1).data_ptr() != own[1]
    for layer in layers.values():
        layer.release()
    assert weight(model, 0)[3, 4] == -1.0
    assert mapped(model.double(), tmp_path) == {}, "weights of another type cannot be mapped"

"""A model that is larger than a GPU is pruned there one layer at a time, to the same weights.

The GPU is a fake device (tests/fake_device.py), whose tensors cannot be mixed with the CPU's.
"""

from __future__ import annotations

import weakref
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stillhouse.pruning import layer_streaming, offload
from stillhouse.pruning.layer_streaming import on_device, stream_layers
from stillhouse.pruning.prune import prune_model
from stillhouse.pruning.pruning_config import PruningMethod
from stillhouse.students import pruned_student
from stillhouse.students.pruned_student import prune_to
from stillhouse.students.student_config import PrunedStudent
from stillhouse.teachers.activations import decoder_layers
from tests import forks
from tests.fake_device import FakeDevice, register
from tests.forks import Fork
from tests.sampled import sampled
from tests.teachers.toys import ToyWindows, tiny_model, toy_tokenizer

CUTS: dict[str, dict[str, Any]] = {
    "ffn": {"ffn_size": 40, "local_tokens": 512},
    "layers": {"layers": 2, "ffn_size": 40},
    "influence": {"layers": 2, "method": PruningMethod(depth_importance="block_influence")},
    "heads and channels": {"heads": 2, "hidden_size": 24},
    "rotation": {"hidden_size": 24, "hidden_method": "rotation"},
    "tokens": {"ffn_size": 40, "kept_ids": range(60)},
    "tied": {"hidden_size": 24, "tie_word_embeddings": True},
    "experts": {"kind": "qwen3_moe", "experts": 2, "ffn_size": 8},
}
TINY = ("kind", "tie_word_embeddings")


def made(cut: dict[str, Any]) -> Any:
    model = tiny_model(**{key: cut[key] for key in TINY if key in cut})
    if "kind" in cut:
        model.set_experts_implementation(
            "eager"
        )  # the fake device does not support the default one
    return model


def pruned(model: Any, cut: dict[str, Any]) -> None:
    prune_model(model, ToyWindows(), **{key: cut[key] for key in cut if key not in TINY})


class Copies:
    """Counts the bytes of layers' weights that have been copied to the device and are alive."""

    def __init__(self, model: Any) -> None:
        self.alive = self.most = 0
        self._names = {id(weight) for one in decoder_layers(model) for weight in one.parameters()}
        self._real = layer_streaming._on
        layer_streaming._on = self._on

    def _on(self, value: Tensor, device: torch.device | str) -> Tensor:
        copy = self._real(value, device)
        if id(value) in self._names and torch.device(device).type != "cpu":
            self.alive += copy.nbytes
            self.most = max(self.most, self.alive)
            weakref.finalize(copy, self._gone, copy.nbytes)
        return copy

    def _gone(self, size: int) -> None:
        self.alive -= size


def compare(name: str, *, offloaded: bool) -> None:
    """Runs in a separate process, because registering the device changes the process."""
    device = register()
    cut = CUTS[name]
    expected, model = made(cut), made(cut)
    with FakeDevice():
        layer_streaming._move(expected.modules(), device)
        pruned(expected, cut)
        layer_streaming._move(expected.modules(), "cpu")
    if offloaded:
        offload.offload(model)
    layers = list(decoder_layers(model))
    size = max(sum(weight.nbytes for weight in one.parameters()) for one in layers)
    copies = Copies(model)
    with FakeDevice():
        with ExitStack() as stack:
            stack.callback(stream_layers(model, device))
            assert model.device.type == device.type
            pruned(model, cut)
            assert {w.device.type for one in layers for w in one.parameters()} == {"cpu"}
        assert 0 < copies.most <= 2 * size  # a kept layer, and a dropped one after it
        assert copies.alive == 0
    assert {weight.device.type for weight in model.parameters()} == {"cpu"}
    assert all(map(offload.is_offloaded, layers)) == offloaded
    found = dict(model.named_parameters())
    assert found.keys() == dict(expected.named_parameters()).keys()
    for key, weight in expected.named_parameters():
        assert torch.equal(found[key], weight), key


@pytest.mark.run
@sampled(
    "name, offloaded",
    {name: name for name in CUTS},
    {"memory": False, "disk": True},
    fast=[
        "ffn-memory",
        "layers-disk",
        "influence-memory",
        "heads and channels-memory",
        "rotation-disk",
        "tokens-memory",
        "tied-disk",
        "experts-memory",
        "experts-disk",
    ],
)
def test_one_layer_at_a_time_gives_the_weights_of_a_whole_model_on_the_device(
    name: str, offloaded: bool
) -> None:
    fork = Fork(partial(compare, name, offloaded=offloaded))
    assert fork.wait(timeout=120) == 0, fork.communicate()[1][-3000:]


def place(free: int, out: Path) -> None:
    """Prunes with this much free memory on the device, and writes the notes to `out`."""
    device = register()
    forks.patch(pruned_student, "default_device", lambda: device)
    forks.patch(pruned_student, "free_memory_bytes", lambda _: free)
    section = PrunedStudent(start="pruned", ffn_size=40, calibration_tokens=256)
    notes: list[str] = []
    forks.patch(pruned_student, "note", notes.append)
    with FakeDevice():
        prune_to(section, tiny_model(), toy_tokenizer(), ToyWindows())
    out.write_text("\n".join(notes))


@pytest.mark.run
@pytest.mark.parametrize(
    ("share", "expected"),
    [(1.0, "Pruning on fakegpu:0 with"), (0.8, "a layer at a time"), (0.1, "Pruning on cpu")],
)
def test_free_memory_decides_where_a_model_is_pruned(
    tmp_path: Path, share: float, expected: str
) -> None:
    model = tiny_model()
    size = sum(weight.numel() for weight in model.parameters())
    work = 16 * 256 * model.config.hidden_size + 4 * model.config.intermediate_size**2
    free = int(4 * (work + share * size))
    fork = Fork(partial(place, free, tmp_path / "notes"))
    assert fork.wait(timeout=120) == 0, fork.communicate()[1][-3000:]
    assert expected in (tmp_path / "notes").read_text()


def test_changed_weights_return_and_others_are_not_copied_back() -> None:
    layer = nn.Linear(3, 2)
    home = layer.weight
    with on_device(layer, "meta"):
        assert layer.weight.is_meta
    assert layer.weight is home
    with on_device(layer, torch.device("cpu"), changed=True):
        layer.weight = nn.Parameter(torch.zeros(1, 3))
    assert layer.weight.shape == (1, 3)

"""Prune a model that does not fit on a GPU there: its layers are copied to it one at a time.

Embeddings, last norm and head are on the GPU throughout. A layer's weights stay in the host's
memory, or on disk (see offload.py), and are on the GPU while the layer runs or is cut.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from stillhouse.pruning.offload import is_offloaded, offload
from stillhouse.teachers.activations import decoder_layers

Owner = tuple[nn.Module, str]
"""A module and the name of one of its own parameters or buffers."""


@contextmanager
def streamed(model: Any, device: torch.device) -> Iterator[None]:
    """`stream_layers` for the block; after it, all of the model is on the host, or on disk if it
    was."""
    stop = stream_layers(model, device)
    try:
        yield
    finally:
        stop()


def stream_layers(model: Any, device: torch.device) -> Callable[[], None]:
    """Use a model on the device from now on, with its layers on the host.

    A layer that is called is copied to the device for the call, unless its forward is replaced;
    work on its parts takes place inside `on_device`. Returns a function that ends this.
    """
    layers = list(decoder_layers(model))
    inside = {id(module) for layer in layers for module in layer.modules()}
    calls: list[ExitStack] = []

    def move_ends(to: torch.device | str) -> None:
        _move([module for module in model.modules() if id(module) not in inside], to)

    def enter(layer: nn.Module, *_: object) -> None:
        calls.append(ExitStack())
        if "forward" not in vars(layer):
            calls[-1].enter_context(on_device(layer, model.device))

    def leave(*_: object) -> None:
        calls.pop().close()

    def stop() -> None:
        for handle in handles:
            handle.remove()
        move_ends("cpu")
        if is_offloaded(model):
            offload(model)

    move_ends(device)
    handles = [layer.register_forward_pre_hook(enter) for layer in layers]
    handles += [layer.register_forward_hook(leave, always_call=True) for layer in layers]
    return stop


@contextmanager
def on_device(
    layer: nn.Module, device: torch.device | str, *, changed: bool = False
) -> Iterator[None]:
    """Inside the block, the layer's weights are on the device.

    changed: the block changes or replaces them; afterwards the host has the new ones.
    """
    homes = {owner: value for owner, value in _own(layer.modules()) if value.device != device}
    _set({owner: _on(value, device) for owner, value in homes.items()})
    try:
        yield
    finally:
        if homes and changed:
            _set({owner: _returned(new, homes.get(owner)) for owner, new in _own(layer.modules())})
        else:
            _set(homes)


def _returned(new: Tensor, home: Tensor | None) -> Tensor:
    """The values in the host's tensor that they came from, if it has their shape."""
    if home is None or home.shape != new.shape:
        return _on(new, "cpu")
    home.data.copy_(new.detach())
    return home


def _move(modules: Iterable[nn.Module], device: torch.device | str) -> None:
    """Move the modules' own tensors; tied ones stay tied."""
    moved: dict[int, Tensor] = {}
    own = dict(_own(modules))
    for value in own.values():
        if id(value) not in moved:
            moved[id(value)] = _on(value, device)
    _set({owner: moved[id(value)] for owner, value in own.items()})


def _own(modules: Iterable[nn.Module]) -> Iterator[tuple[Owner, Tensor]]:
    for module in modules:
        for tensors in (module._parameters, module._buffers):
            for name, value in tensors.items():
                if value is not None:
                    yield (module, name), value


def _set(values: dict[Owner, Tensor]) -> None:
    for (module, name), value in values.items():
        setattr(module, name, value)


def _on(value: Tensor, device: torch.device | str) -> Tensor:
    copy = value.detach().to(device)
    if isinstance(value, nn.Parameter):
        return nn.Parameter(copy, requires_grad=value.requires_grad)
    return copy

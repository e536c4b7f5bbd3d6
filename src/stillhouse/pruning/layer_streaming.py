"""Stream layers to a GPU one at a time, to prune a model that does not fit there.

The embeddings, the last norm, and the head stay on the GPU. A layer's weights stay in host memory,
or on disk (see offload.py), and are only on the GPU while the layer runs or is cut.
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
"""A module, and the name of a parameter or buffer that is directly in it."""


def stream_layers(model: Any, device: torch.device) -> Callable[[], None]:
    """Run a model on the device from now on, while its layers' weights stay on the host.

    When a layer is called, its weights are copied to the device for the call, unless its forward is
    replaced. To work on parts of a layer, use `on_device`.

    Returns a function that ends streaming, and moves the whole model back to the host, or to disk
    if it was there.
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
    """Within the context, keep the layer's weights on the device.

    changed: the weights are changed or replaced there, so the new ones are copied back to the host.
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
    """Copy the values back into the host's tensor if the shape is unchanged, else to a new one."""
    if home is None or home.shape != new.shape:
        return _on(new, "cpu")
    home.data.copy_(new.detach())
    return home


def _move(modules: Iterable[nn.Module], device: torch.device | str) -> None:
    """Move the tensors that are directly in the modules; tied tensors stay tied."""
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

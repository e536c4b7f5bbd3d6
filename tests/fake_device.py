"""A fake device: its tensors are on the CPU, and operations that would wait for it are recorded.

PyTorch treats it as an accelerator. An operation on it that would make the host wait for a GPU
is recorded with the lines of code that led to it: reading a value, an operation whose result's
shape depends on values, and a copy between host and device without `non_blocking`.
Registering the device changes the process, so use it in a separate one.
"""

from __future__ import annotations

import traceback
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten
from torch.utils.backend_registration import (
    _DummyBackendModule,
    _setup_privateuseone_for_python_backend,
)

NAME = "fakegpu"
WAITS = {
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "equal",
    "_unique2",
    "unique_dim",
    "bincount",
    "repeat_interleave.Tensor",
}
CPU = torch.device("cpu")


class OnDevice(torch.Tensor):
    """A tensor that claims to be on the device. held: its values, on the CPU."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, real: torch.Tensor) -> OnDevice:
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            real.size(),
            strides=real.stride(),
            storage_offset=real.storage_offset(),
            dtype=real.dtype,
            device=torch.device(NAME, 0),
            requires_grad=real.requires_grad,
        )
        made.held = real
        return made

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def __repr__(self) -> str:  # type: ignore[override]  # torch's has an argument of its own
        return f"OnDevice({tuple(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch's stub lacks the @classmethod
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return FakeDevice.current.call(func, args, kwargs or {})


class FakeDevice(TorchDispatchMode):
    """A context in which the device exists. waits: where the host would have waited for it."""

    current: FakeDevice

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self.recording = False
        FakeDevice.current = self

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.call(func, args, kwargs or {})

    def call(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        flat, spec = tree_flatten((args, kwargs))
        from_device = [each for each in flat if isinstance(each, OnDevice)]
        to_device = kwargs.get("device")
        to_device = None if to_device is None else torch.device(to_device).type
        if not from_device and to_device != NAME:
            return func(*args, **kwargs)
        if self.recording:
            self._check(func, args, kwargs, from_device)
        owners = {id(each.held): each for each in from_device}
        real = [each.held if isinstance(each, OnDevice) else each for each in flat]
        real_args, real_kwargs = tree_unflatten(real, spec)
        if to_device is not None:
            real_kwargs["device"] = CPU
        if real_kwargs.pop("pin_memory", False):
            real_kwargs["pin_memory"] = False
        found = func(*real_args, **real_kwargs)
        if to_device == "cpu" or (to_device is None and not from_device):
            return found

        def owned(value: Any) -> Any:
            if not isinstance(value, torch.Tensor):
                return value
            owner = owners.get(id(value))
            return OnDevice(value) if owner is None else owner

        copied_to_host = func.overloadpacket.__name__ == "copy_" and not isinstance(
            args[0], OnDevice
        )
        return args[0] if copied_to_host else tree_map(owned, found)

    def _check(self, func: Any, args: Any, kwargs: dict[str, Any], tensors: list[OnDevice]) -> None:
        name = func.overloadpacket.__name__
        waits = name in WAITS or f"{name}.{func._overloadname}" in WAITS
        if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            masks = (torch.bool, torch.uint8)
            waits = any(index is not None and index.dtype in masks for index in args[1])
        if name == "_to_copy" and kwargs.get("device") is not None:
            moved = isinstance(args[0], OnDevice) != (torch.device(kwargs["device"]).type == NAME)
            waits = moved and not kwargs.get("non_blocking")
        if name == "copy_" and isinstance(args[0], OnDevice) != isinstance(args[1], OnDevice):
            waits = not (args[2] if len(args) > 2 else kwargs.get("non_blocking"))
        if waits:
            stack = traceback.extract_stack()
            where = [f"{each.filename}:{each.lineno} {each.line}" for each in stack]
            self.waits.append(f"{func}\n    " + "\n    ".join(where))


class _Backend(_DummyBackendModule):
    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


def register() -> torch.device:
    """Register the device with PyTorch and return it."""
    _setup_privateuseone_for_python_backend(NAME, _Backend())
    for name in ("tensor", "as_tensor"):
        setattr(torch, name, _on_host_first(getattr(torch, name)))
    return torch.device(NAME, 0)


def _on_host_first(make: Any) -> Any:
    """Wrap torch.tensor: create the tensor on the host, so that the mode sees it being copied."""

    def made(data: Any, *, dtype: Any = None, device: Any = None, **more: Any) -> torch.Tensor:
        if device is None or torch.device(device).type != NAME:
            return make(data, dtype=dtype, device=device, **more)
        return make(data, dtype=dtype, **more).to(device)

    return made

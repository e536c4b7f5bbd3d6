"""Recomputes the results of cheap operations in the backward pass instead of keeping them.

Autograd keeps every tensor that a gradient needs. In a language model's layers, half of these are
products or activations of tensors that it keeps anyway: the two products of a norm, and in a gated
FFN the gate's activation and its product. Recomputing them takes hardly any time, and the results
are identical bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import Node, saved_tensors_hooks

LEAST_NUMBERS = 1 << 10
"""Tensors with fewer elements are kept."""


@dataclass(frozen=True)
class _Result:
    """A function's result, without its values. versions: those of the tensors among the inputs."""

    function: Callable[..., Tensor]
    inputs: tuple[Tensor | _Result, ...]
    versions: tuple[int, ...]

    def tensor(self) -> Tensor:
        kept = [each for each in self.inputs if isinstance(each, Tensor)]
        if self.versions != tuple(each._version for each in kept):
            raise RuntimeError("a tensor that the backward pass needs was changed in place")
        return self.function(
            *(each if isinstance(each, Tensor) else each.tensor() for each in self.inputs)
        )


def _is_reshaped(tensor: Tensor, base: Tensor) -> bool:
    """Whether a view contains all elements of its base, in the same order."""
    return (
        tensor.numel() == base.numel()
        and tensor.dtype == base.dtype
        and tensor.is_contiguous()
        and base.is_contiguous()
    )


_FUNCTIONS: dict[str, tuple[Callable[[Any], Callable[..., Tensor]], tuple[str, ...]]] = {
    "MulBackward0": (lambda node: torch.mul, ("_saved_self", "_saved_other")),
    "SiluBackward0": (lambda node: F.silu, ("_saved_self",)),
    "GeluBackward0": (
        lambda node: partial(F.gelu, approximate=node._saved_approximate),
        ("_saved_self",),
    ),
}
"""The function and the attributes with its inputs, by the name of the operation's node in
autograd's graph."""


class Hooks:
    """The hooks that autograd calls when it saves a tensor and when it needs it again."""

    def __init__(self) -> None:
        self._looks_up, self._found = False, None
        self._nothing = torch.empty(0)

    def pack(self, tensor: Tensor) -> Tensor | _Result:
        node, base = tensor.grad_fn, tensor._base
        if node is None or tensor.numel() < LEAST_NUMBERS:
            return tensor
        if tensor._version:  # changed in place, so no longer the operation's result
            return tensor
        if base is not None and _is_reshaped(tensor, base):
            whole, shape = self.pack(base), tensor.shape
            if isinstance(whole, Tensor):
                return tensor
            return _Result(lambda values: values.view(shape), (whole,), ())
        if node.name() not in _FUNCTIONS:
            return tensor
        make, names = _FUNCTIONS[node.name()]
        inputs = tuple(self._kept(node, name) for name in names)
        if any(each is None for each in inputs):  # for example, a tensor scaled by a number
            return tensor
        versions = tuple(each._version for each in inputs if isinstance(each, Tensor))
        return _Result(make(node), inputs, versions)  # type: ignore[arg-type]

    def unpack(self, kept: Tensor | _Result) -> Tensor:
        if self._looks_up:
            self._found = kept  # type: ignore[assignment]
            return self._nothing
        return kept if isinstance(kept, Tensor) else kept.tensor()

    def _kept(self, node: Node, name: str) -> Tensor | _Result | None:
        """Return what `pack` returned for a tensor that this node saved; None if it saved none."""
        self._looks_up, self._found = True, None
        try:
            getattr(node, name)  # calls `unpack`
        finally:
            self._looks_up = False
        found, self._found = self._found, None
        return found


@contextmanager
def recomputed() -> Iterator[None]:
    """Do not keep the results of cheap operations for the backward pass inside the block.

    Do not use it around layers with activation checkpointing, which keep nothing anyway.
    """
    hooks = Hooks()
    with saved_tensors_hooks(hooks.pack, hooks.unpack):
        yield

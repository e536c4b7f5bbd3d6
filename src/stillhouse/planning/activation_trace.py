"""Measures the memory of a model's activations by running the model on fake tensors.

A forward and a backward pass run on PyTorch's fake tensors, which have shapes and dtypes but no
data, and the sizes of the tensors alive at each operation are added up. So the figures follow any
architecture's own code.
"""

from __future__ import annotations

import contextlib
import copy
import weakref
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM

from stillhouse.errors import ModelError
from stillhouse.recomputed import recomputed
from stillhouse.teachers.backbone import hidden_states
from stillhouse.teachers.document_rows import separates_documents
from stillhouse.teachers.planned_model import shape_key
from stillhouse.teachers.quiet import quiet
from stillhouse.teachers.short_attention import use_short_attention


@dataclass(frozen=True)
class ActivationSizes:
    """Sizes in bytes, not counting the weights and their gradients.

    kept: what the forward pass keeps for the backward pass. forward, backward: what is alive at the
    peak of each pass, without copies of weights. casts, backward_casts: copies of weights in the
    compute dtype in the forward and the backward pass, which do not grow with the batch. course:
    over the backward pass, pairs of what is alive besides gradients and the gradients computed so
    far.
    """

    kept: int
    forward: int
    backward: int
    casts: int
    backward_casts: int
    course: tuple[tuple[int, int], ...] = ()

    @property
    def with_gradients(self) -> int:
        """Bytes at the peak of a backward pass that starts without gradients, including those."""
        return max((alive + made for alive, made in self.course), default=0)

    def times(self, windows: int) -> ActivationSizes:
        """Return the sizes for so many windows at once."""
        return ActivationSizes(
            kept=windows * self.kept,
            forward=windows * self.forward,
            backward=windows * self.backward,
            casts=self.casts,
            backward_casts=self.backward_casts,
            course=tuple((windows * alive, made) for alive, made in self.course),
        )


def trace_activations(
    config: Any,
    context: int,
    *,
    compute: torch.dtype,
    weights: torch.dtype,
    device: Literal["cpu", "cuda"],
    checkpointing: bool = False,
    inference: bool = False,
    keep_casts: bool = True,
) -> ActivationSizes:
    """Trace a backbone, from the tokens to the last hidden states, on one window of packed
    documents.

    weights: the weights' dtype; if it is not `compute`, products run under autocast. inference:
    whether to run only a forward pass that keeps nothing, whose peak is `forward`. keep_casts:
    whether autocast keeps its copies of weights until the end of the forward pass.
    Raises ModelError if the architecture cannot be traced.
    """
    keep_casts = keep_casts or weights == compute  # without casts, both are the same
    choices = context, compute, weights, device, checkpointing, inference, keep_casts
    key = shape_key(config), *choices
    if key not in _TRACED:
        try:
            with quiet(), FakeTensorMode():
                _TRACED[key] = _trace(config, *choices)
        # An architecture's code may look at values, which fake tensors do not have.
        except Exception as error:
            problem = f"{type(error).__name__}: {error}".splitlines()[0][:300]
            raise ModelError(
                f"the memory of a {config.model_type} model cannot be estimated ({problem})",
                where=getattr(config, "name_or_path", None) or None,
                fix="run a few steps (train.max_steps) and see how much memory they use",
            ) from error
    return _TRACED[key]


_TRACED: dict[tuple[Any, ...], ActivationSizes] = {}


def _trace(
    config: Any,
    context: int,
    compute: torch.dtype,
    weights: torch.dtype,
    device: str,
    checkpointing: bool,
    inference: bool,
    keep_casts: bool,
) -> ActivationSizes:
    own = copy.deepcopy(config)  # `dtype` is written to it
    model = AutoModelForCausalLM.from_config(own, dtype=weights)
    model.train(not inference)
    use_short_attention(model, context, torch.device(device))
    if checkpointing:
        model.gradient_checkpointing_enable()
    ids_RL = torch.zeros(1, context, dtype=torch.long)
    positions_RL = torch.arange(context)[None] if separates_documents(model) else None
    grad = torch.no_grad() if inference else contextlib.nullcontext()
    little = device == "cpu" and not (checkpointing or inference)
    kept_again = recomputed() if little else contextlib.nullcontext()
    with grad, kept_again, _Alive(model) as alive:
        enabled = weights != compute
        with torch.autocast("cpu", compute, enabled=enabled, cache_enabled=keep_casts):
            last_RLD = hidden_states(model, ids_RL, positions_RL)
            casts = alive.cast_bytes  # still alive while the loss is computed
        kept, forward = alive.bytes, alive.peak
        alive.restart()
        if not inference:
            last_RLD.backward(torch.empty_like(last_RLD))
    return ActivationSizes(
        kept=kept,
        forward=forward,
        backward=alive.peak,
        casts=casts,
        backward_casts=alive.cast_peak,
        course=tuple((most, made) for made, most in alive.course.items()),
    )


class _Alive(TorchDispatchMode):
    """Adds up the storages that are alive, except the model's own.

    bytes, peak: the activations' current and peak bytes. cast_bytes, cast_peak: the same for copies
    of weights in a different dtype. course: the peak by the bytes of completed gradients; a
    completed gradient no longer counts as an activation.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        parameters = list(model.parameters())
        tensors = [*parameters, *model.buffers()]
        self._own = {tensor.untyped_storage()._cdata for tensor in tensors}
        self._known: set[int] = set()
        self._gradients = 0
        self.bytes = self.cast_bytes = 0
        self.restart()
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(self._take_gradient)

    def restart(self) -> None:
        """Reset the peaks to what is alive now."""
        self.peak, self.cast_peak = self.bytes, self.cast_bytes
        self.course: dict[int, int] = {}

    def _take_gradient(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        self._gradients += parameter.grad.untyped_storage().nbytes()
        parameter.grad = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = _run(func, args, kwargs or {})
        copies = func is torch.ops.aten._to_copy.default
        cast = copies and args[0].untyped_storage()._cdata in self._own
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage(), cast)
        self.peak = max(self.peak, self.bytes)
        self.cast_peak = max(self.cast_peak, self.cast_bytes)
        self.course[self._gradients] = max(self.course.get(self._gradients, 0), self.bytes)
        return result

    def _add(self, storage: torch.UntypedStorage, cast: bool) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._own or key in self._known:
            return
        self._known.add(key)
        self._count(size, cast)
        weakref.finalize(storage, self._drop, key, size, cast)

    def _drop(self, key: int, size: int, cast: bool) -> None:
        self._known.discard(key)
        self._count(-size, cast)

    def _count(self, size: int, cast: bool) -> None:
        if cast:
            self.cast_bytes += size
        else:
            self.bytes += size


def _run(func: Any, args: Any, kwargs: Any) -> Any:
    """Run an operation. Grouped float32 products have no fake implementation, so run them in
    bfloat16."""
    grouped = "_grouped_mm" in func.__name__
    if not grouped or args[0].dtype == torch.bfloat16:
        return func(*args, **kwargs)
    narrow = [arg.bfloat16() if torch.is_floating_point(arg) else arg for arg in args[:2]]
    return func(*narrow, *args[2:], **kwargs).to(args[0].dtype)

"""Float32 matrix products on x86 CPUs with oneDNN instead of MKL.

PyTorch calls MKL, which reached half of oneDNN's speed on an AMD CPU with AVX-512
(docs/experiments.md). The operator is the one that PyTorch's compiler generates for a linear layer.

Shapes: N rows, K columns that are summed over, M columns of the result.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

LEAST_WORK = 1 << 22
"""Number of multiplications below which the call's overhead outweighs the gain."""


def product(a_NK: Tensor, b_MK: Tensor) -> Tensor:
    """Compute a bᵀ, [N, M]. Both operands may be transposed views."""
    if not is_fast(a_NK, b_MK):
        return a_NK @ b_MK.T
    columns = a_NK.stride(0) == 1 and a_NK.stride(1) >= len(a_NK)  # gaps between columns are fine
    # For other layouts, oneDNN has only a reference implementation, which is 100 times slower.
    return _onednn(a_NK if columns else _dense(a_NK), _dense(b_MK))


def is_fast(a_NK: Tensor, b_MK: Tensor) -> bool:
    """Whether oneDNN computes this product."""
    return (
        type(a_NK) is Tensor
        and a_NK.dtype == b_MK.dtype == torch.float32
        and a_NK.device.type == b_MK.device.type == "cpu"
        and a_NK.numel() * len(b_MK) >= LEAST_WORK
        and bool(torch.backends.mkldnn.enabled)
        and works()
    )


def batched_product(a_BNK: Tensor, b_BMK: Tensor) -> Tensor:
    """Compute a bᵀ for each pair, [B, N, M]. Its gradients are `batched_gradients`."""
    if len(a_BNK) and is_fast(a_BNK[0], b_BMK[0]):
        return _each(a_BNK, b_BMK)
    return a_BNK @ b_BMK.mT


def batched_gradients(grad_BNM: Tensor, a_BNK: Tensor, b_BMK: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the gradients of the inputs to `batched_product`."""
    if len(a_BNK) and is_fast(a_BNK[0], b_BMK[0]):
        return _each(grad_BNM, b_BMK.mT), _each(grad_BNM.mT, a_BNK.mT)
    return grad_BNM @ b_BMK, (a_BNK.mT @ grad_BNM).mT


@contextmanager
def fast_linear(device: torch.device) -> Iterator[None]:
    """Make `torch.nn.functional.linear` use these products, forward and backward, in the block.

    Not for layers with activation checkpointing, which are recomputed outside the block.
    """
    if device.type != "cpu" or torch.is_autocast_enabled("cpu") or not works():
        yield
        return
    with _FastLinear():
        yield


class _FastLinear(TorchFunctionMode):
    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if (
            func is F.linear
            and not kwargs
            and not torch.is_autocast_enabled("cpu")
            and _is_plain(*args)
        ):
            input_, weight_MK, bias_M = (*args, None)[:3]
            rows_NK = input_.flatten(0, -2)
            if is_fast(rows_NK, weight_MK):
                out_NM = _Linear.apply(rows_NK, weight_MK, bias_M)
                return out_NM.view(*input_.shape[:-1], -1)
        return func(*args, **(kwargs or {}))


def _is_plain(input_: Any, weight: Any, bias: Any = None) -> bool:
    """Whether it is a linear layer of ordinary tensors: not sharded, quantized or fake."""
    parameters = [weight] if bias is None else [weight, bias]
    ordinary = all(type(each) in (Tensor, torch.nn.Parameter) for each in parameters)
    return ordinary and type(input_) is Tensor and input_.dim() > 1 and weight.dim() == 2


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_NK: Tensor, weight_MK: Tensor, bias_M: Tensor | None) -> Tensor:
        to_rows, to_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(rows_NK if to_weight else None, weight_MK if to_rows else None)
        out_NM = product(rows_NK, weight_MK)
        return out_NM if bias_M is None else out_NM.add_(bias_M)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NM: Tensor) -> tuple[Tensor | None, ...]:
        rows_NK, weight_MK = ctx.saved_tensors
        to_rows, to_weight, to_bias = ctx.needs_input_grad
        return (
            product(grad_NM, weight_MK.T) if to_rows else None,
            product(grad_NM.T, rows_NK.T) if to_weight else None,
            grad_NM.sum(0) if to_bias else None,
        )


def _each(a_BNK: Tensor, b_BMK: Tensor) -> Tensor:
    out_BNM = a_BNK.new_empty(len(a_BNK), a_BNK.shape[1], b_BMK.shape[1])
    for out_NM, a_NK, b_MK in zip(out_BNM, a_BNK, b_BMK, strict=True):
        out_NM.copy_(product(a_NK, b_MK))
    return out_BNM


def _dense(b_MK: Tensor) -> Tensor:
    """Make a matrix contiguous, by rows or by columns."""
    return b_MK if b_MK.is_contiguous() or b_MK.T.is_contiguous() else b_MK.contiguous()


def _onednn(a_NK: Tensor, b_MK: Tensor) -> Tensor:
    found: Tensor = torch.ops.mkldnn._linear_pointwise(a_NK, b_MK, None, "none", [], "")
    return found


@cache
def works() -> bool:
    """Whether this is an x86 CPU and this build of PyTorch has the operator and computes it
    correctly."""
    if not torch.backends.mkldnn.is_available():
        return False
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    # With small integers, every product and sum is exact.
    a = torch.arange(12.0).view(3, 4)
    b = torch.arange(20.0).view(5, 4)
    try:
        return torch.equal(_onednn(a, b), a @ b.T)
    except RuntimeError:
        return False

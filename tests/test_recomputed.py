"""Results that backward recomputes take no memory, and gradients stay the same."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig, Qwen3Config

from stillhouse.recomputed import LEAST_NUMBERS, recomputed
from stillhouse.teachers.backbone import hidden_states

pytestmark = pytest.mark.run
SIZES: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
CONFIGS = {
    "llama": LlamaConfig(**SIZES),
    "qwen3": Qwen3Config(**SIZES),
    "gemma3, with GELU": Gemma3TextConfig(**SIZES),
}
IDS = torch.arange(128).remainder(50)[None]


def gradients(model: nn.Module, *, again: bool) -> list[Tensor]:
    model.zero_grad()
    with recomputed() if again else nullcontext():
        hidden_RLD = hidden_states(model, IDS, torch.arange(128)[None])
    hidden_RLD.square().sum().backward()
    found = [weight.grad for weight in model.parameters() if weight.grad is not None]
    assert found
    return found


@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_are_equal_bit_for_bit(name: str) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name])
    expected, found = gradients(model, again=False), gradients(model, again=True)
    assert all(torch.equal(*pair) for pair in zip(expected, found, strict=True))


def kept_numbers(function: Callable[[Tensor], Tensor], start: Tensor, *weights: Tensor) -> int:
    """Count the numbers in tensors that live after a forward pass, except inputs and result."""
    alive: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            found = func(*args, **(kwargs or {}))
            if isinstance(found, Tensor):
                storage = found.untyped_storage()
                alive[storage._cdata] = weakref.ref(storage)
            return found

    with Watch(), recomputed():
        result = function(start)
    own = {each.untyped_storage()._cdata for each in (start, *weights, result)}
    storages = [ref() for key, ref in alive.items() if key not in own]
    return sum(storage.nbytes() // 4 for storage in storages if storage is not None)


def test_intermediate_results_are_not_kept_and_gradients_are_equal() -> None:
    start = torch.randn(LEAST_NUMBERS, requires_grad=True)
    up = torch.randn(LEAST_NUMBERS, requires_grad=True)
    weight = torch.randn(LEAST_NUMBERS, requires_grad=True)

    def gated(x: Tensor) -> Tensor:
        return (F.silu(x) * up).view(64, -1) * weight.view(64, -1)

    result = gated(start)
    result.sum().backward()
    expected = [each.grad for each in (start, up, weight)]
    for each in (start, up, weight):
        each.grad = None
    assert kept_numbers(gated, start, up, weight) == 0
    with recomputed():
        result = gated(start)
    result.sum().backward()
    found = [each.grad for each in (start, up, weight)]
    for one, other in zip(expected, found, strict=True):
        assert one is not None
        assert other is not None
        assert torch.equal(one, other)


def test_the_gradient_through_a_scaled_tensor_is_correct() -> None:
    start = torch.randn(LEAST_NUMBERS, requires_grad=True)
    with recomputed():
        result = (start * 3.0).square()
    result.sum().backward()
    assert start.grad is not None
    torch.testing.assert_close(start.grad, 18.0 * start.detach())


def test_the_gradient_through_results_changed_in_place_is_correct() -> None:
    start = torch.randn(LEAST_NUMBERS, requires_grad=True)
    with recomputed():
        result = (F.silu(start).mul_(2.0) + F.silu(start + 1.0, inplace=True)).square()
    expected = (2.0 * F.silu(start) + F.silu(start + 1.0)).square()
    torch.testing.assert_close(
        torch.autograd.grad(result.sum(), start), torch.autograd.grad(expected.sum(), start)
    )


def test_a_changed_input_is_an_error() -> None:
    start = torch.randn(LEAST_NUMBERS, requires_grad=True)
    inner = start + 1.0
    with recomputed():
        result = F.silu(inner).square()
    inner.detach().mul_(2.0)
    with pytest.raises(RuntimeError, match="changed in place"):
        result.sum().backward()


def test_other_hooks_are_active_again_after_the_block() -> None:
    seen: list[Tensor] = []

    def keep(kept: Tensor) -> Tensor:
        seen.append(kept)
        return kept

    with saved_tensors_hooks(keep, lambda kept: kept):
        with recomputed():
            torch.ones(3, requires_grad=True).square()
        assert not seen
        torch.ones(3, requires_grad=True).square()
    assert seen

"""Matrix products by oneDNN equal PyTorch's, forward and backward, wherever they are used."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from stillhouse import cpu_products
from stillhouse.cpu_products import (
    LEAST_WORK,
    batched_gradients,
    batched_product,
    fast_linear,
    is_fast,
    product,
)
from stillhouse.teachers.backbone import hidden_states

CPU = torch.device("cpu")
needs_onednn = pytest.mark.skipif(not cpu_products.works(), reason="no oneDNN on this CPU")


def views_of(rows: int, columns: int) -> dict[str, torch.Tensor]:
    """The same shape in different layouts."""
    torch.manual_seed(rows)
    return {
        "rows": torch.randn(rows, columns),
        "columns": torch.randn(columns, rows).T,
        "slice": torch.randn(rows, columns + 5)[:, 2 : columns + 2],
        "slice of columns": torch.randn(columns, rows + 5)[:, 2 : rows + 2].T,
        "every other": torch.randn(rows, 2 * columns)[:, ::2],
        "expanded": torch.randn(rows, 1).expand(rows, columns),
    }


def recorded_calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, ...]]:
    """The arguments of every call of oneDNN's product from here on."""
    calls: list[tuple[Tensor, ...]] = []
    plain = cpu_products._onednn

    def record(*arguments: Tensor) -> Tensor:
        calls.append(arguments)
        return plain(*arguments)

    monkeypatch.setattr(cpu_products, "_onednn", record)
    return calls


@needs_onednn
@pytest.mark.parametrize("a", views_of(4, 4))
@pytest.mark.parametrize("b", views_of(4, 4))
def test_products_of_any_layout_are_correct_and_fast(
    a: str, b: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """oneDNN is given only layouts for which it has fast code."""
    given = recorded_calls(monkeypatch)
    a_NK, b_MK = views_of(131, 260)[a], views_of(127, 260)[b]
    assert is_fast(a_NK, b_MK)
    product(a_NK, b_MK)
    [(left, right)] = given
    assert left.is_contiguous() or left.stride(0) == 1
    assert right.is_contiguous() or right.T.is_contiguous()
    expected_NM = a_NK.double() @ b_MK.double().T
    error = (product(a_NK, b_MK) - expected_NM).norm() / expected_NM.norm()
    assert error < 1e-5


def test_small_products_and_other_dtypes_use_pytorch() -> None:
    small = torch.randn(8, 16)
    large = torch.randn(1024, 256)
    others = [small, large.double(), large.bfloat16()]
    assert small.numel() * len(small) < LEAST_WORK < large.numel() * len(large)
    for x in others:
        assert not is_fast(x, x)
        assert torch.equal(product(x, x), x @ x.T)
    with torch.backends.mkldnn.flags(enabled=False):
        assert torch.equal(product(large, large), large @ large.T)


@needs_onednn
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_a_linear_layer_and_its_gradients_equal_pytorchs(
    bias: bool, frozen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = torch.nn.Linear(160, 200, bias=bias)
    layer.weight.requires_grad_(not frozen)
    x = torch.randn(2, 90, 160, requires_grad=True)
    upstream = torch.randn(2, 90, 200)

    def gradients() -> list[torch.Tensor | None]:
        found = torch.autograd.grad(out, [x, *(p for p in layer.parameters() if p.requires_grad)],
                                    upstream)  # fmt: skip
        return [out.detach(), *found]

    out = layer(x)
    expected = gradients()
    calls = recorded_calls(monkeypatch)
    with fast_linear(CPU):
        out = layer(x)
    for mine, theirs in zip(gradients(), expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
    assert len(calls) == (2 if frozen else 3)


@needs_onednn
@pytest.mark.parametrize("transposed", [False, True])
def test_batched_products_and_their_gradients_equal_pytorchs(
    transposed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    a = torch.randn(3, 256, 160, requires_grad=True)
    b = torch.randn(3, 160, 130) if transposed else torch.randn(3, 130, 160)
    b.requires_grad_()
    b_BMK = b.mT if transposed else b
    upstream = torch.randn(3, 256, 130)
    expected = [a @ b_BMK.mT, *torch.autograd.grad(a @ b_BMK.mT, [a, b], upstream)]
    calls = recorded_calls(monkeypatch)
    grad_a, grad_b = batched_gradients(upstream, a.detach(), b_BMK.detach())
    out = batched_product(a.detach(), b_BMK.detach())
    found = [out, grad_a, grad_b.mT if transposed else grad_b]
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
    assert len(calls) == 9


def test_an_empty_batch_of_products_has_the_right_shape() -> None:
    assert batched_product(torch.randn(0, 256, 160), torch.randn(0, 130, 160)).shape == (
        0,
        256,
        130,
    )


@needs_onednn
def test_products_under_autocast_use_pytorch() -> None:
    weight, x = torch.randn(200, 160), torch.randn(180, 160)
    with torch.autocast("cpu", torch.bfloat16):
        expected = F.linear(x, weight)
        with fast_linear(CPU):
            assert torch.equal(F.linear(x, weight), expected)
    with fast_linear(CPU), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(F.linear(x, weight), expected)


@needs_onednn
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_a_models_hidden_states_and_gradients_equal_pytorchs(
    kind: str, checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "vocab_size": 64,
    }
    torch.manual_seed(0)
    model = (
        LlamaForCausalLM(LlamaConfig(**sizes))
        if kind == "llama"
        else Qwen2ForCausalLM(Qwen2Config(**sizes))
    ).train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    ids_RL = torch.randint(0, 64, (2, 160))
    place_RL = torch.arange(160).expand(2, -1)

    def gradients(hidden_RLD: torch.Tensor) -> list[torch.Tensor]:
        model.zero_grad()
        hidden_RLD.square().sum().backward()
        return [each.grad.clone() for each in model.base_model.parameters()]

    plain_RLD = model.base_model(ids_RL, position_ids=place_RL, use_cache=False)[0]
    expected = gradients(plain_RLD)
    calls = recorded_calls(monkeypatch)
    found_RLD = hidden_states(model, ids_RL, place_RL)
    found = gradients(found_RLD)
    assert bool(calls) is not checkpointing
    torch.testing.assert_close(found_RLD, plain_RLD, rtol=1e-4, atol=1e-5)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-3 * float(theirs.abs().max()))

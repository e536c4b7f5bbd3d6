"""Layers with packed weights compute the same as with plain weights, and are restored."""

from __future__ import annotations

import weakref
from collections.abc import Generator, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from transformers import LlamaConfig, LlamaForCausalLM, MambaConfig, MambaForCausalLM

from stillhouse.generation import packed_linear as packing
from stillhouse.generation.generator import TokenPrompt
from stillhouse.generation.local_generator import LocalGenerator
from stillhouse.generation.packed_linear import can_pack, has_room_to_pack, packed_linear

TYPES = [torch.float32, torch.bfloat16]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
PROMPTS = [
    TokenPrompt([5, 6, 7], 40, temperature=1.0, seed=1),
    TokenPrompt([8, 9], 40, temperature=1.0, top_p=0.9, seed=2),
    TokenPrompt([10, 11, 12, 13], 40),
]
needs_packing = pytest.mark.skipif(not can_pack(torch.float32), reason="no oneDNN on this CPU")


@pytest.fixture(autouse=True)
def forget_what_can_be_packed() -> Iterator[None]:
    yield
    can_pack.cache_clear()


def require(dtype: torch.dtype) -> None:
    if not can_pack(dtype):
        pytest.skip(f"this CPU does not pack weights in {dtype}")


def model(*, tied: bool = False, bias: bool = False) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        attention_bias=bias,
        initializer_range=0.3,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def linear_layers(llama: Any) -> list[nn.Linear]:
    return [module for module in llama.modules() if isinstance(module, nn.Linear)]


def is_packed(layer: nn.Module) -> bool:
    return "forward" in vars(layer)


def written(llama: Any, **options: Any) -> list[list[int]]:
    generator = LocalGenerator(llama, frozenset(), **options)
    found = dict(generator.generate(PROMPTS))
    return [list(found[number].ids) for number in range(len(PROMPTS))]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("bias", [False, True])
def test_logits_equal_those_of_plain_weights(dtype: torch.dtype, bias: bool) -> None:
    """For any number of rows."""
    require(dtype)
    llama = model(bias=bias).to(dtype)
    for parameter in llama.parameters():
        parameter.normal_(0, 0.3)  # biases are zeros at first
    for rows, length in [(1, 1), (5, 1), (32, 1), (3, 40)]:
        ids_RL = torch.randint(0, 300, (rows, length))
        expected_RLV = llama(ids_RL).logits
        with packed_linear(llama):
            assert all(map(is_packed, linear_layers(llama)))
            logits_RLV = llama(ids_RL).logits
        assert logits_RLV.dtype == dtype
        error = (logits_RLV.double() - expected_RLV.double()).norm() / expected_RLV.double().norm()
        assert error < TOLERANCE[dtype]
    assert not any(map(is_packed, linear_layers(llama)))
    assert torch.equal(llama(ids_RL).logits, expected_RLV)


@pytest.mark.parametrize("dtype", TYPES)
def test_inputs_may_have_any_memory_layout(dtype: torch.dtype) -> None:
    require(dtype)
    llama = model().to(dtype)
    head = llama.lm_head
    layouts = [
        torch.randn(3, 5, 48)[:, 1:4],
        torch.randn(5, 3, 48).transpose(0, 1),
        torch.randn(4, 96)[:, ::2],
        torch.randn(48, 4).T,
        torch.randn(0, 48),
    ]
    for inputs in layouts:
        with packed_linear(llama):
            found = head(inputs.to(dtype))
        torch.testing.assert_close(found, head(inputs.to(dtype)))


@needs_packing
@pytest.mark.parametrize("batch", [1, 2, 8])
def test_generation_packs_weights_and_restores_the_layers(
    batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    llama = model(tied=True)
    plain = written(llama, batch=batch, pack=False)
    seen: list[bool] = []
    llama.register_forward_pre_hook(lambda *_: seen.append(is_packed(llama.lm_head)))
    assert written(llama, batch=batch) == plain
    assert all(seen)
    assert seen
    assert not any(map(is_packed, linear_layers(llama)))
    generator = LocalGenerator(llama, frozenset(), batch=1).generate(PROMPTS)
    assert isinstance(generator, Generator)
    next(generator)
    generator.close()
    assert not any(map(is_packed, linear_layers(llama)))


def test_short_answers_are_generated_with_plain_weights() -> None:
    llama = model()
    seen: list[bool] = []
    llama.register_forward_pre_hook(lambda *_: seen.append(is_packed(llama.lm_head)))
    list(LocalGenerator(llama, frozenset()).generate([TokenPrompt([5, 6], 8)]))
    assert not any(seen)


def test_each_generation_uses_the_current_weights() -> None:
    llama, other = model(), model()
    generator = LocalGenerator(llama, frozenset())
    list(generator.generate(PROMPTS))
    for one in (llama, other):
        torch.manual_seed(1)
        for parameter in one.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    found = dict(generator.generate(PROMPTS))
    assert [list(found[number].ids) for number in range(3)] == written(other)
    assert written(model()) != written(other)


@needs_packing
def test_packed_copies_are_freed_immediately() -> None:
    llama = model()
    with packed_linear(llama):
        copy = weakref.ref(llama.lm_head.forward)
        assert copy() is not None
    assert copy() is None


@needs_packing
def test_weights_that_other_modules_read_are_not_yielded() -> None:
    for tied in (True, False):
        llama = model(tied=tied)
        with packed_linear(llama) as only:
            assert (llama.lm_head.weight in only) is not tied
            assert len(only) == len(linear_layers(llama)) - tied
            assert llama.model.embed_tokens.weight not in only

    class OwnCode(LlamaForCausalLM):
        pass

    with packed_linear(OwnCode(llama.config)) as only:
        assert not only


@needs_packing
def test_hooks_of_layers_are_called() -> None:
    """Such as those that round inputs in quantization-aware training."""
    llama = model()
    ids_RL = torch.arange(6)[None]
    llama.model.layers[0].mlp.down_proj.register_forward_pre_hook(lambda _, given: given[0].round())
    expected_RLV = llama(ids_RL).logits
    with packed_linear(llama):
        torch.testing.assert_close(llama(ids_RL).logits, expected_RLV)


@needs_packing
def test_unsupported_layers_stay_unchanged() -> None:
    class Other(nn.Linear):
        pass

    class Halves(nn.Module):
        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            return weight / 2

    llama = model()
    attention, mlp = llama.model.layers[0].self_attn, llama.model.layers[0].mlp
    attention.q_proj = Other(48, 48)
    parametrize.register_parametrization(attention.k_proj, "weight", Halves())
    attention.v_proj.double()
    mlp.up_proj.forward = lambda inputs: inputs.new_zeros(*inputs.shape[:-1], 80)
    nn.utils.weight_norm(mlp.gate_proj)
    plain = [attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj]
    own = mlp.up_proj.forward
    with packed_linear(llama):
        assert not any(map(is_packed, plain))
        assert mlp.up_proj.forward is own
        assert is_packed(mlp.down_proj)
    assert mlp.up_proj.forward is own
    with torch.autocast("cpu", torch.bfloat16), packed_linear(llama):
        assert not is_packed(mlp.down_proj)


@needs_packing
@pytest.mark.parametrize("failure", ["operator", "numbers", "disabled", "memory"])
def test_plain_weights_are_used_if_packing_fails(
    failure: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    llama = model()
    plain = written(llama, pack=False)
    seen: list[bool] = []
    llama.register_forward_pre_hook(lambda *_: seen.append(is_packed(llama.lm_head)))
    can_pack.cache_clear()

    def fails(*_: Any) -> Any:
        raise RuntimeError("not implemented")

    if failure == "operator":
        monkeypatch.setattr(packing, "_packed", fails)
    elif failure == "numbers":
        monkeypatch.setattr(packing, "_product", lambda inputs, *_: inputs.new_zeros(40, 7))
    elif failure == "memory":
        monkeypatch.setattr(packing, "free_memory_bytes", lambda _: 4 * 48 * 300)
        assert not has_room_to_pack(llama)
    with torch.backends.mkldnn.flags(enabled=failure != "disabled"):
        assert written(llama) == plain
    assert not any(seen)


@needs_packing
@pytest.mark.parametrize("batch", [1, 2])
def test_without_avx512_a_single_row_uses_plain_weights(
    batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    llama = model()
    seen: list[bool] = []
    llama.register_forward_pre_hook(lambda *_: seen.append(is_packed(llama.lm_head)))
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    written(llama, batch=batch)
    assert set(seen) == {batch > 1}


def test_bfloat16_is_packed_only_if_the_cpu_supports_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    can_pack.cache_clear()
    assert not can_pack(torch.bfloat16)
    assert not can_pack(torch.float64)


def test_recurrent_models_stay_unchanged() -> None:
    """Such models read the weights of their linear layers directly."""
    config = MambaConfig(
        vocab_size=300, hidden_size=16, state_size=4, num_hidden_layers=1, use_mambapy=False
    )
    with packed_linear(MambaForCausalLM(config)) as only:
        assert not only

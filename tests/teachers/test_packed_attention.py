"""Packed attention matches masked SDPA, and is chosen only where it works."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AutoModelForCausalLM, LlamaConfig
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from stillhouse.data.batches import document_bounds
from stillhouse.errors import ModelError
from stillhouse.teachers import packed_attention as attention
from stillhouse.teachers.attention_checks import (
    FLEX,
    TOLERANCE,
    Heads,
    kernel_error,
    masked_attention,
    model_error,
    problem_of_flex,
    problem_of_kernel,
)
from stillhouse.teachers.backbone import hidden_states
from stillhouse.teachers.packed_attention import use_attention
from tests.teachers.test_short_attention import CONFIGS, LATENT, PACKED, PLAIN, SIZES, made, run

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Pretends to have a GPU with a working kernel, which runs on the CPU; lists its calls."""
    calls: list[int] = []

    def kernel(*args: Any, **options: Any) -> Tensor:
        calls.append(1)
        return masked_attention(*args, **options)

    monkeypatch.setattr(attention, "varlen_kernel", lambda: kernel)
    monkeypatch.setattr(attention, "_is_new_enough", lambda device: True)
    monkeypatch.setattr(attention, "problem_of_kernel", lambda *given: None)
    return calls


@pytest.fixture(autouse=True)
def no_cached_choice() -> Iterator[None]:
    """Clears the cached choice of attention, which is made once per process."""
    attention.working_attention.cache_clear()
    yield
    attention.working_attention.cache_clear()


def test_document_bounds_follow_from_the_positions() -> None:
    assert document_bounds(PACKED).tolist() == [0, 9, 16, 20, 40]
    assert document_bounds(PLAIN).tolist() == [0, 20, 40]
    assert document_bounds(torch.tensor([[0, 0, 0]])).tolist() == [0, 1, 2, 3]
    assert document_bounds(PACKED).dtype == torch.int32


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("positions_RL", [PACKED, PLAIN, None], ids=["packed", "plain", "none"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_hidden_states_and_gradients_match_sdpa(
    name: str, positions_RL: Tensor, checkpointing: bool, gpu: list[int]
) -> None:
    model = made(CONFIGS[name])
    expected, expected_grads = run(model, positions_RL)
    if checkpointing:
        model.train()
        model.gradient_checkpointing_enable()
    assert use_attention(model, 20, GPU, torch.bfloat16) == attention.NAME
    found, grads = run(model, positions_RL)
    assert len(gpu) == (6 if checkpointing else 3)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    for grad, wanted in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, wanted, rtol=1e-7, atol=1e-9)


def test_generation_uses_sdpa(gpu: list[int]) -> None:
    model = made(CONFIGS["gemma3, sliding window"]).eval()
    ids_RL = torch.tensor([[0, 0, 7, 8, 9], [3, 4, 5, 6, 7]])
    mask_RL = torch.tensor([[0, 0, 1, 1, 1], [1] * 5])
    settings = {"attention_mask": mask_RL, "max_new_tokens": 8, "do_sample": False}
    expected = model.generate(ids_RL, pad_token_id=0, **settings)
    use_attention(model, 20, GPU, torch.bfloat16)
    assert torch.equal(model.generate(ids_RL, pad_token_id=0, **settings), expected)
    assert not gpu


def test_other_devices_dtypes_and_models_use_other_attention(gpu: list[int]) -> None:
    llama = CONFIGS["llama"]
    assert use_attention(made(llama), 20, CPU, torch.bfloat16) == "stillhouse_short"
    assert use_attention(made(llama), 2000, CPU, torch.bfloat16) == "sdpa"
    assert use_attention(made(llama), 20, torch.device("mps"), torch.bfloat16) == "sdpa"
    assert use_attention(made(llama), 20, GPU, torch.float32) == "sdpa"
    dropping = LlamaConfig(**SIZES, attention_dropout=0.1)
    assert use_attention(made(dropping), 20, GPU, torch.bfloat16) == "sdpa"
    assert use_attention(made(LATENT), 20, GPU, torch.bfloat16) == "sdpa"
    eager = AutoModelForCausalLM.from_config(llama, attn_implementation="eager")
    assert use_attention(eager, 20, GPU, torch.bfloat16) == "eager"


def test_attention_changes_when_a_model_moves_between_devices(gpu: list[int]) -> None:
    model = made(CONFIGS["llama"])
    found = [use_attention(model, 20, place, torch.bfloat16) for place in (GPU, CPU, GPU)]
    assert found == [attention.NAME, "stillhouse_short", attention.NAME]


@pytest.mark.parametrize(("width", "chosen"), [(16, "flex_attention"), (8, "sdpa")])
def test_flex_attention_is_chosen_without_a_kernel(
    width: int, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "varlen_kernel", lambda: None)
    monkeypatch.setattr(attention, "problem_of_flex", lambda *given: None)
    config = LlamaConfig(**{**SIZES, "head_dim": width})
    assert use_attention(made(config), 20, GPU, torch.bfloat16) == chosen


@pytest.mark.slow
def test_flex_attention_separates_documents_like_sdpa() -> None:
    """Compiled for a CPU, where it has no backward pass."""
    config = LlamaConfig(**{**SIZES, "head_dim": 16})
    model = made(config).float().eval()
    ids_RL = torch.randint(0, 50, (2, 20))
    with torch.no_grad():
        expected = hidden_states(model, ids_RL, PACKED)
        model.set_attn_implementation("flex_attention")
        found = hidden_states(model, ids_RL, PACKED)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def failing(*args: Any, **options: Any) -> Tensor:
    raise RuntimeError("no kernel image\nfor this GPU")


def without_window(*args: Any, **options: Any) -> Tensor:
    return masked_attention(*args, **options | {"window_size": (-1, 0)})


def test_a_kernel_that_fails_or_differs_is_detected() -> None:
    heads = Heads(CPU, torch.bfloat16, 4, 2, 8)
    assert problem_of_kernel(failing, heads) == "fails (no kernel image)"
    assert str(problem_of_kernel(without_window, heads)).startswith("is off by ")
    assert problem_of_kernel(masked_attention, heads) is None


FLASH_FAILS = "torch's flash attention fails (no kernel image)"


@pytest.mark.parametrize(
    ("flex", "problem", "chosen", "said"),
    [
        (True, None, FLEX, f"packed windows use flex attention: {FLASH_FAILS}\n"),
        (False, None, "sdpa", f"packed windows use SDPA: {FLASH_FAILS}\n"),
        (
            True,
            "is off",
            "sdpa",
            f"packed windows use SDPA: {FLASH_FAILS}; flex attention is off\n",
        ),
    ],
    ids=["flex", "no flex", "flex differs"],
)
def test_a_note_says_what_replaces_a_failing_kernel(
    flex: bool,
    problem: str | None,
    chosen: str,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(attention, "varlen_kernel", lambda: failing)
    monkeypatch.setattr(attention, "_is_new_enough", lambda device: True)
    monkeypatch.setattr(attention, "problem_of_flex", lambda *given: problem)
    heads = Heads(CPU, torch.bfloat16, 4, 2, 8)
    for _ in range(2):
        found = attention.working_attention(heads, flash=True, flex=flex)
        assert found == chosen
    assert capsys.readouterr().err == said  # once


def test_old_gpus_and_old_torch_use_sdpa_without_a_note(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(attention, "varlen_kernel", lambda: failing)
    heads = Heads(CPU, torch.float16, 4, 2, 8)
    assert attention.working_attention(heads, flash=True, flex=False) == "sdpa"
    monkeypatch.setattr(attention, "varlen_kernel", lambda: None)
    assert attention.working_attention(heads, flash=True, flex=False) == "sdpa"
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("window", [None, 150])
def test_model_error_detects_attention_across_documents(window: int | None) -> None:
    def without_documents(module: Any, *rows: Tensor, **options: Any) -> Any:
        options["is_causal"] = True
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, *rows[:3], None, **options)

    AttentionInterface.register("without_documents", without_documents)
    AttentionMaskInterface.register("without_documents", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    heads = Heads(CPU, torch.float32, 4, 2, 16)
    assert model_error("eager", heads, window) < 1e-5
    assert model_error("without_documents", heads, window) > TOLERANCE


def test_the_reference_of_the_kernel_separates_documents() -> None:
    error = kernel_error(masked_attention, Heads(CPU, torch.float32, 4, 2, 8), None)
    assert error == 0
    rows = [torch.randn(6, 2, 4) for _ in range(3)]
    bounds = torch.tensor([0, 2, 6], dtype=torch.int32)
    query, key, value = rows
    whole = masked_attention(
        query, key, value, bounds, bounds, 4, 4,
        scale=0.5, window_size=(-1, 0), enable_gqa=False,
    )  # fmt: skip
    for part in (slice(0, 2), slice(2, 6)):
        query, key, value = (each[part].transpose(0, 1) for each in rows)
        alone = nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=0.5
        )
        torch.testing.assert_close(whole[part], alone.transpose(0, 1))


def test_missing_document_bounds_are_an_error(gpu: list[int]) -> None:
    query, key, value = (torch.randn(1, 2, 6, 4) for _ in range(3))
    mask = torch.ones(1, 1, 1, 1, dtype=torch.bool)
    with pytest.raises(ModelError, match="does not pass the bounds of documents"):
        attention.packed_attention(nn.Identity(), query, key, value, mask)


def test_keys_are_repeated_for_a_kernel_without_grouped_heads() -> None:
    def plain(*rows: Any, **options: Any) -> Tensor:
        assert rows[1].shape == rows[0].shape
        return masked_attention(*rows, enable_gqa=False, **options)

    kernel = attention.with_repeated_heads(plain)
    for groups in (4, 2, 1):
        assert kernel_error(kernel, Heads(CPU, torch.float32, 4, groups, 8), None) < 1e-6


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize(("heads", "groups", "width"), [(4, 2, 64), (8, 8, 128), (8, 1, 256)])
def test_the_kernel_of_a_gpu_has_no_problem(heads: int, groups: int, width: int) -> None:
    kernel = attention.varlen_kernel()
    assert kernel is not None
    assert problem_of_kernel(kernel, Heads(GPU, torch.bfloat16, heads, groups, width)) is None


@pytest.mark.slow
@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_flex_attention_works_on_a_gpu() -> None:
    """Compiling it takes about a minute."""
    assert problem_of_flex(Heads(GPU, torch.bfloat16, 4, 2, 64)) is None

"""AdamW with 8-bit moments and bfloat16 weights."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import nn

from stillhouse.training import compact_adamw
from stillhouse.training.compact_adamw import (
    CompactAdamW,
    _map,
    block_of,
    clip_gradients,
    rounded,
)

CPU = torch.device("cpu")
OPTIONS: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.95), "weight_decay": 0.1}


def steps(weight: nn.Parameter, optimizer: torch.optim.Optimizer, count: int = 5) -> None:
    g = torch.Generator().manual_seed(1)
    for _ in range(count):
        weight.grad = torch.randn(weight.shape, generator=g).to(weight.dtype)
        optimizer.step()


def start(*shape: int, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    g = torch.Generator().manual_seed(0)
    return nn.Parameter(torch.randn(shape, generator=g).to(dtype))


@pytest.mark.parametrize("shape", [(7, 96), (5,), ()])
def test_with_32_bits_it_matches_adamw(shape: tuple[int, ...]) -> None:
    ours, theirs = start(*shape), start(*shape)
    steps(ours, CompactAdamW([ours], **OPTIONS))
    steps(theirs, torch.optim.AdamW([theirs], **OPTIONS))
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


def test_the_map_of_8_bit_codes_matches_torchao() -> None:
    utils = pytest.importorskip("torchao.optim.quant_utils")
    for signed in (True, False):
        assert _map(signed, CPU).tolist() == torch.tensor(utils.create_dynamic_map(signed)).tolist()


def test_with_8_bits_it_matches_adamw_of_torchao() -> None:
    """Rows are multiples of 256 values, so that both have the same blocks."""
    adam = pytest.importorskip("torchao.optim.adam")
    state = pytest.importorskip("torchao.optim.subclass_8bit").OptimState8bit
    ours, theirs = start(16, 512), start(16, 512)
    optimizer = CompactAdamW([ours], bits=8, **OPTIONS)
    moments = [state.zeros(theirs.shape, signed, 256) for signed in (True, False)]
    g = torch.Generator().manual_seed(1)
    for step in range(1, 5):
        gradient = torch.randn(16, 512, generator=g)
        ours.grad = gradient
        optimizer.step()
        with torch.no_grad():
            adam.single_param_adam(
                theirs,
                gradient,
                torch.tensor(float(step)),
                *moments,
                None,
                torch.tensor(1e-2),
                0.9,
                0.95,
                0.1,
                1e-8,
                True,
                False,
            )
    differing = (optimizer.state[ours]["exp_avg"] != moments[0].codes).float().mean()
    assert differing < 1e-3  # values halfway between two codes may be rounded differently
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_moments_in_8_bits_take_about_two_bytes_per_weight() -> None:
    weight = start(64, 512)
    optimizer = CompactAdamW([weight], bits=8)
    steps(weight, optimizer, 1)
    sizes = [each.nbytes for each in optimizer.state[weight].values()]
    assert sum(sizes) - 4 == weight.numel() * (2 + 2 * 4 / 256)


def test_the_block_size_divides_the_row_or_is_none() -> None:
    assert [block_of(width, 2) for width in (4096, 576, 24, 8, 251)] == [256, 192, 24, None, 251]
    assert block_of(257, 2) is None
    assert block_of(4096, 1) is None


@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_state_resumes_bit_for_bit(
    tmp_path: Path, bits: Literal[8, 32], dtype: torch.dtype
) -> None:
    ours = start(6, 32, dtype=dtype)
    optimizer = CompactAdamW([ours], bits=bits, **OPTIONS)
    steps(ours, optimizer, 3)
    again = nn.Parameter(ours.detach().clone())
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    steps(ours, optimizer, 3)
    resumed = CompactAdamW([again], bits=bits, **OPTIONS)
    resumed.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    steps(again, resumed, 3)
    assert torch.equal(ours, again)


def test_loading_an_empty_state_leaves_the_state_empty() -> None:
    """torch.distributed.checkpoint creates an optimizer's state only if it has none."""
    optimizer = CompactAdamW([start(4, 32)], bits=8)
    optimizer.load_state_dict(optimizer.state_dict())
    assert not optimizer.state


def test_a_state_with_another_number_of_bits_is_rejected() -> None:
    weight = start(4, 32)
    narrow, wide = CompactAdamW([weight], bits=8), CompactAdamW([weight], bits=32)
    with pytest.raises(ValueError, match="32 bits"):
        wide.load_state_dict(narrow.state_dict())


@pytest.mark.parametrize("bits", [8, 32])
def test_updates_do_not_depend_on_the_chunk_size(
    monkeypatch: pytest.MonkeyPatch, bits: Literal[8, 32]
) -> None:
    whole = start(8, 48, dtype=torch.bfloat16)
    chunked = nn.Parameter(whole.detach().clone())
    steps(whole, CompactAdamW([whole], bits=bits, **OPTIONS))
    monkeypatch.setitem(compact_adamw.CHUNK, "cpu", 100)
    steps(chunked, CompactAdamW([chunked], bits=bits, **OPTIONS))
    assert torch.equal(whole, chunked)


def test_a_weight_that_is_not_contiguous_is_updated_in_place() -> None:
    whole = start(6, 32)
    turned = nn.Parameter(whole.detach().T.contiguous().T)
    assert not turned.is_contiguous()
    steps(whole, CompactAdamW([whole], bits=8, **OPTIONS))
    steps(turned, CompactAdamW([turned], bits=8, **OPTIONS))
    assert torch.equal(whole, turned)


def test_stochastic_rounding_is_unbiased() -> None:
    value = torch.tensor(1 + 0.3 * 2**-7)  # its neighbors in bfloat16 are 1 and 1 + 2^-7
    for sign in (1, -1):
        found = rounded((sign * value).repeat(100_000), 0, key=12345)
        assert set(found.abs().tolist()) == {1.0, 1 + 2**-7}
        assert float(found.float().mean()) == pytest.approx(sign * float(value), abs=1e-4)


def test_rounding_keeps_bfloat16_values_and_depends_on_the_position() -> None:
    exact = torch.randn(1000, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert torch.equal(rounded(exact.float(), 0, key=7), exact)
    values = torch.rand(64, generator=torch.Generator().manual_seed(0))
    whole = rounded(values, 0, key=7)
    assert torch.equal(rounded(values[40:], 40, key=7), whole[40:])
    assert not torch.equal(rounded(values, 0, key=8), whole)


def test_many_small_updates_of_bfloat16_weights_accumulate() -> None:
    """Each is a tenth of the distance between two bfloat16 values."""
    weight = nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))
    optimizer = CompactAdamW([weight], lr=2**-7 / 10)
    for _ in range(50):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    assert float(weight.detach().float().mean()) == pytest.approx(1 - 5 * 2**-7, rel=1e-3)


def test_gradients_are_clipped_as_in_torch() -> None:
    weights = [start(3, 4), start(5)]
    for number, weight in enumerate(weights):
        weight.grad = torch.full_like(weight, 2.0 + number)
    copies = copy.deepcopy(weights)
    for weight, twin in zip(weights, copies, strict=True):
        twin.grad = weight.grad.clone() if weight.grad is not None else None
    norm = clip_gradients(weights, 1.0)
    assert float(norm) == pytest.approx(float(nn.utils.clip_grad_norm_(copies, 1.0)))
    for weight, twin in zip(weights, copies, strict=True):
        torch.testing.assert_close(weight.grad, twin.grad)

"""FLOPs that are counted during a computation match the formulas."""

from __future__ import annotations

import pytest
import torch

from stillhouse import account
from tests.teachers.toys import ToyWindows, tiny_model


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_the_flops_of_a_forward_pass_match_the_formula(kind: str) -> None:
    model, ids = tiny_model(kind, hidden_size=128, intermediate_size=512), ToyWindows().ids
    with account.CountedFlops() as counted:
        model(input_ids=ids, use_cache=False)
    size = account.count_parameters(model).active
    assert counted.flops == pytest.approx(account.forward_flops(size, ids.numel()), rel=0.02)


def test_a_mixture_of_experts_counts_only_the_active_experts() -> None:
    sizes = {"hidden_size": 128, "moe_intermediate_size": 512, "num_experts_per_tok": 2}
    model, ids = tiny_model("qwen3_moe", **sizes, num_experts=8), ToyWindows().ids
    with account.CountedFlops() as counted:
        model(input_ids=ids, use_cache=False)
    size = account.count_parameters(model)
    assert counted.flops == pytest.approx(account.forward_flops(size.active, ids.numel()), rel=0.02)
    assert size.total > 2 * size.active


def test_the_flops_of_a_training_step_match_the_formula() -> None:
    weight = torch.randn(8, 16, requires_grad=True)
    rows = torch.randn(4, 16, requires_grad=True)
    with account.CountedFlops() as counted:
        (rows @ weight.T).sum().backward()
    assert counted.flops == account.training_flops(weight.numel(), 4)


def test_the_flops_of_linear_algebra_match_textbook_formulas() -> None:
    square = torch.eye(6) + 0.1
    with account.CountedFlops() as counted:
        torch.cholesky_inverse(torch.linalg.cholesky_ex(square)[0])
        torch.linalg.solve(square, torch.ones(6, 3))
        torch.linalg.eigh(square)
        square.clone().addmm_(square, square)
    expected = 6**3 + (2 * 6**3 / 3 + 2 * 6**2 * 3) + 9 * 6**3 + 2 * 6**3
    assert counted.flops == expected

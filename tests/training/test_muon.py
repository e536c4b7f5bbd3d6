"""Muon for matrices, and AdamW for the rest."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from stillhouse.training.distillation import Distillation
from stillhouse.training.muon import Muon, muon_for, orthogonalized
from tests import tiny

OPTIONS = {"lr": 1e-2, "betas": (0.9, 0.95), "weight_decay": 0.1}


def start(*shape: int, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    g = torch.Generator().manual_seed(0)
    return nn.Parameter(torch.randn(shape, generator=g).to(dtype))


def steps(weights: list[nn.Parameter], optimizer: torch.optim.Optimizer, count: int = 4) -> None:
    g = torch.Generator().manual_seed(1)
    for _ in range(count):
        for weight in weights:
            weight.grad = torch.randn(weight.shape, generator=g).to(weight.dtype)
        optimizer.step()


def of_matrices(weight: nn.Parameter, products: torch.dtype = torch.float32) -> Muon:
    return Muon([{"params": [weight], "matrices": True}], products=products, **OPTIONS)


@pytest.mark.parametrize("shape", [(24, 24), (16, 40), (40, 16)])
def test_updates_match_the_muon_of_torch(shape: tuple[int, int]) -> None:
    """torch's Muon computes its matrix products in bfloat16."""
    ours, theirs = start(*shape), start(*shape)
    steps([ours], of_matrices(ours, torch.bfloat16))
    reference = torch.optim.Muon(
        [theirs], lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"
    )
    steps([theirs], reference)
    moved = (theirs - start(*shape)).abs().mean()
    assert (ours - theirs).abs().mean() < 0.05 * moved  # rounding differs


@pytest.mark.parametrize("shape", [(16, 40), (40, 16)])
def test_singular_values_become_about_one(shape: tuple[int, int]) -> None:
    matrix = start(*shape).detach()
    values = torch.linalg.svdvals(orthogonalized(matrix))
    assert values.min() > 0.6
    assert values.max() < 1.3
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    nearest = u @ v
    found = orthogonalized(matrix)
    assert torch.nn.functional.cosine_similarity(found.ravel(), nearest.ravel(), dim=0) > 0.97


def test_a_zero_gradient_gives_a_zero_update() -> None:
    assert torch.equal(orthogonalized(torch.zeros(3, 5)), torch.zeros(3, 5))


def test_each_matrix_of_a_stack_is_updated_separately() -> None:
    stack = start(3, 8, 12)
    alone = [nn.Parameter(each.clone()) for each in stack.detach()]
    g = torch.Generator().manual_seed(1)
    together = of_matrices(stack)
    single = [of_matrices(each) for each in alone]
    for _ in range(3):
        stack.grad = torch.randn(stack.shape, generator=g)
        together.step()
        for weight, optimizer, gradient in zip(alone, single, stack.grad, strict=True):
            weight.grad = gradient.clone()
            optimizer.step()
    torch.testing.assert_close(stack.detach(), torch.stack([each.detach() for each in alone]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_state_resumes_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    weights = [start(6, 32, dtype=dtype), start(32, dtype=dtype)]

    def made(weights: list[nn.Parameter]) -> Muon:
        groups = [{"params": weights[:1], "matrices": True}, {"params": weights[1:]}]
        return Muon(groups, products=torch.float32, **OPTIONS)

    optimizer = made(weights)
    steps(weights, optimizer, 3)
    again = [nn.Parameter(each.detach().clone()) for each in weights]
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    steps(weights, optimizer, 3)
    resumed = made(again)
    resumed.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    assert {each.dtype for each in resumed.state[again[0]].values()} == {torch.float32}
    steps(again, resumed, 3)
    assert all(map(torch.equal, weights, again))


@pytest.mark.run
def test_bfloat16_weights_follow_float32_ones() -> None:
    """Updates that are far smaller than a weight are not lost on average."""
    wide = nn.Parameter(torch.full((256, 256), 3.0))
    narrow = nn.Parameter(wide.detach().bfloat16())
    moved = []
    for weight in (wide, narrow):
        optimizer = Muon([{"params": [weight], "matrices": True}], products=torch.float32, lr=1e-3)
        weight.grad = torch.ones_like(weight)
        for _ in range(50):
            optimizer.step()
        moved.append(float(weight.detach().float().mean()) - 3)
    assert moved[0] < -1e-4
    assert moved[1] == pytest.approx(moved[0], rel=0.1)


def test_muon_updates_only_the_matrices_of_layers() -> None:
    student = tiny.llama(tie_word_embeddings=False)
    module = Distillation(student)
    optimizer = muon_for(module, products=torch.float32)
    names = {weight: name for name, weight in student.named_parameters()}
    chosen = [
        names[each]
        for group in optimizer.param_groups
        if group["matrices"]
        for each in group["params"]
    ]
    assert chosen == [name for name in names.values() if ".layers." in name and "norm" not in name]
    together = [names[each] for group in optimizer.param_groups for each in group["params"]]
    assert sorted(together) == sorted(names.values())

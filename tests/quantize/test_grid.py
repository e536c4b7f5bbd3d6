"""Rounding to the grid agrees with a reference that rounds one number at a time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from stillhouse.quantize.grid import WEIGHTED, Grid, choose_scales, on_grid, to_codes

GRIDS = [Grid(4, 8), Grid(8, 16), Grid(8, None, floating=True)]


def from_codes(codes_OI: Tensor, scales_OG: Tensor) -> Tensor:
    """The weights s·q, float32 [O, I], without rounding."""
    groups_OGg = codes_OI.float().unflatten(-1, (scales_OG.shape[-1], -1))
    return (groups_OGg * scales_OG.float()[..., None]).flatten(-2)


def matrix(seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 0.05 * torch.randn(5, 32, generator=generator)


def every_code(grid: Grid) -> Tensor:
    if not grid.floating:
        return torch.arange(grid.lowest, grid.highest + 1).float()
    numbers = torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn).float()
    return numbers[numbers.isfinite()]


@pytest.mark.parametrize("grid", GRIDS)
def test_scales_are_the_best_of_those_tried(grid: Grid) -> None:
    """Compared with a search in plain Python, group by group and number by number."""
    weight_OI = matrix()
    scales_OG = choose_scales(weight_OI, grid)
    every = every_code(grid).tolist()
    for row in range(len(weight_OI)):
        for index, group in enumerate(weight_OI[row].split(grid.group or 32)):
            extreme = max(group.tolist(), key=abs)
            errors = {}
            for largest in grid.places(weighted=False):
                scale = float(torch.tensor(extreme / largest).half())
                codes = [min(every, key=lambda q: abs(w - scale * q)) for w in group.tolist()]
                errors[scale] = sum(
                    (w - scale * q) ** 2 for w, q in zip(group.tolist(), codes, strict=True)
                )
            best = float(scales_OG[row, index])
            assert errors[best] == pytest.approx(min(errors.values()), rel=1e-3)


def test_scales_have_the_least_error_weighted_by_moments() -> None:
    grid, moment_I = Grid(4, 8), torch.ones(32)
    moment_I[::8] = 1e-4
    weight_OI = matrix()
    weight_OI[:, ::8] *= (
        5  # the largest number of each group belongs to an input that hardly matters
    )
    plain_OG, weighted_OG = choose_scales(weight_OI, grid), choose_scales(weight_OI, grid, moment_I)

    def error(scales_OG: Tensor) -> float:
        off_OI = on_grid(weight_OI, scales_OG, grid) - weight_OI
        return float((off_OI.square() * moment_I).sum())

    assert error(weighted_OG) < 0.6 * error(plain_OG)
    extreme_OG = weight_OI.unflatten(-1, (-1, 8))[..., 0]
    candidates = [(extreme_OG / place).half().float() for place in WEIGHTED[4]]
    assert error(weighted_OG) <= min(map(error, candidates))


@pytest.mark.parametrize("grid", GRIDS)
def test_weights_are_rounded_to_the_nearest_number_on_the_grid(grid: Grid) -> None:
    weight_OI = matrix()
    scales_OG = choose_scales(weight_OI, grid)
    near_OI = on_grid(weight_OI, scales_OG, grid)
    points_OIq = scales_OG.repeat_interleave(grid.group or 32, -1)[..., None] * every_code(grid)
    least_OI = (points_OIq - weight_OI[..., None]).abs().amin(-1)
    assert torch.allclose((near_OI - weight_OI).abs(), least_OI, atol=1e-9)


@pytest.mark.parametrize("grid", GRIDS)
def test_codes_and_scales_represent_weights_on_the_grid_exactly(grid: Grid) -> None:
    """Rounding weights on the grid again does not change a bit."""
    scales_OG = choose_scales(matrix(), grid)
    assert torch.equal(scales_OG, scales_OG.half().float()), "float16 holds every scale"
    once_OI = on_grid(matrix(), scales_OG, grid)
    codes_OI = to_codes(once_OI, scales_OG, grid)
    assert codes_OI.dtype == (torch.float8_e4m3fn if grid.floating else torch.int8)
    assert torch.equal(from_codes(codes_OI, scales_OG), once_OI)
    assert torch.equal(on_grid(once_OI, scales_OG, grid), once_OI)
    assert torch.isin(codes_OI.float(), every_code(grid)).all()


def test_a_group_of_zeros_stays_zero() -> None:
    weight_OI = matrix()
    weight_OI[2, 8:16] = 0
    scales_OG = choose_scales(weight_OI, Grid(4, 8))
    assert scales_OG[2, 1] == 0
    assert not on_grid(weight_OI, scales_OG, Grid(4, 8))[2, 8:16].any()


def test_bytes_count_codes_and_scales() -> None:
    assert Grid(4, 32).bytes(32, rows=1) == 16 + 2, "as a q4_0 block of GGUF"
    assert Grid(8, 32).bytes(64, rows=1) == 2 * (32 + 2)
    assert Grid(8, None, floating=True).bytes(64, rows=4) == 64 + 4 * 2


def test_numbers_beyond_float8_become_its_largest_number() -> None:
    """A cast to float8 would turn it into NaN."""
    grid = Grid(8, None, floating=True)
    codes_OI = to_codes(torch.tensor([[1e6, -1e6, 1.0]]), torch.ones(1, 1), grid)
    assert codes_OI.float().tolist() == [[448, -448, 1]]

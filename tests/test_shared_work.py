"""Sums that are divided among processes are equal bit for bit for any number of processes."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from stillhouse.shared_work import ALONE, Processes, all_processes
from tests import forks


def terms(processes: Processes, items: int) -> list[list[Tensor]]:
    """Values of very different sizes, so that the order of additions matters."""
    found = []
    for item in processes.part(items):
        generator = torch.Generator().manual_seed(item)
        values = torch.randn(100, generator=generator)
        found.append([values * 10.0 ** (item % 5), values[:3] / 3])
    return found


def summed(processes: Processes, items: int) -> list[Tensor]:
    return processes.sum(terms(processes, items), items, lambda: [torch.empty(100), torch.empty(3)])


@pytest.mark.parametrize("items", [1, 2, 3, 7, 8, 13])
def test_a_sum_adds_every_term_once(items: int) -> None:
    expected = [sum(values) for values in zip(*terms(ALONE, items), strict=True)]
    torch.testing.assert_close(summed(ALONE, items), expected, rtol=1e-5, atol=1e-2)


@pytest.mark.parametrize("items", [1, 5, 24])
@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_each_item_has_one_owner(items: int, count: int) -> None:
    parts = [Processes(own, count).part(items) for own in range(count)]
    assert [item for part in parts for item in part] == list(range(items))
    for item in range(items):
        assert item in parts[Processes(0, count).owner(item, items)]


def divided(out: Path) -> None:
    processes = all_processes()
    sums = {items: summed(processes, items) for items in (1, 2, 5, 13)}
    found = {
        "sums": sums,
        "collected": processes.collect(processes.own * 10),
        "main": processes.from_main(processes.own),
        "owner": processes.from_owner(
            1, lambda: [torch.tensor([float(processes.own)])], lambda: [torch.empty(1)]
        ),
        "turn": processes.in_turn("abcde"),
    }
    torch.save(found, out / str(processes.own))


@pytest.mark.run
@pytest.mark.parametrize("count", [2, 3])
def test_several_processes_agree_with_one(tmp_path: Path, count: int) -> None:
    """This includes a sum of one term by three processes, two of which have none."""
    for rank in forks.ranks(count, partial(divided, tmp_path)):
        assert rank.wait(timeout=100) == 0, rank.communicate()[1][-3000:]
    for own in range(count):
        found = torch.load(tmp_path / str(own))
        for items, sums in found["sums"].items():
            for one, many in zip(summed(ALONE, items), sums, strict=True):
                assert torch.equal(one, many)
        assert found["collected"] == [10 * process for process in range(count)]
        assert found["main"] == 0
        assert found["owner"] == [torch.tensor([1.0])]
        assert found["turn"] == "abcde"[own::count]

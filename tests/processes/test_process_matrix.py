"""Complete runs by two processes, four, and two nodes of two end with the weights of one process.

`make test-processes` runs them. All runs with the same number of processes share the processes.

A step has four windows. Two processes with micro-batches of two windows add the same two gradients
as one process, so the weights are equal bit for bit. Four gradients can be added in several orders,
and each way to divide the windows has its own. How much the order matters is measured in one
process, for each training, with micro-batches of one window, two, and all four. In a cascade, it
matters more from hop to hop, since a student begins where the previous one ended.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import forks
from tests.processes.process_runs import (
    KINDS,
    difference,
    differences,
    finish,
    orders_apart,
    recipe,
    run_all,
    too_far,
)

pytestmark = pytest.mark.processes

REORDERED = 5e-7
"""Under FSDP2, a layer's gradients from above and from a term on its output are added in a
different order."""
SHARDS = ("none", "student", "teacher", "both")
SECONDS = 3000


def runs(
    inputs: Path, folder: Path, shards: tuple[str, ...], processes: int, nodes: int
) -> dict[tuple[str, str], Path]:
    """The folders of runs of every kind with every choice of `shards`."""
    within = "all" if nodes == 1 else "node"
    found = {(kind, shard): folder / f"{kind} {shard}" for kind in KINDS for shard in shards}
    recipes = [
        recipe(inputs, place, kind, shard=shard, shard_within=within)
        for (kind, shard), place in found.items()
    ]
    finish(forks.ranks(processes, run_all, recipes, nodes=nodes), SECONDS)
    return found


def test_two_processes_end_with_the_weights_of_one(
    inputs: Path, alone: Path, tmp_path: Path
) -> None:
    found, allowed = {}, {}
    for case, folder in runs(inputs, tmp_path, SHARDS, processes=2, nodes=1).items():
        kind, shard = case
        found[case] = max(differences(folder, alone / f"{kind} 2"))
        allowed[case] = REORDERED if kind == "hidden" and shard in ("student", "both") else 0
    assert {case: value for case, value in found.items() if value > allowed[case]} == {}, found


@pytest.mark.parametrize(
    ("nodes", "shards"), [(1, SHARDS), (2, ("student", "both"))], ids=["one node", "two nodes"]
)
def test_four_processes_differ_from_one_only_by_the_order_of_sums(
    inputs: Path, alone: Path, tmp_path: Path, nodes: int, shards: tuple[str, ...]
) -> None:
    folders = runs(inputs, tmp_path, shards, processes=4, nodes=nodes)
    found = {
        (kind, shard): differences(folder, alone / f"{kind} 1")
        for (kind, shard), folder in folders.items()
    }
    apart = {kind: orders_apart(alone, kind) for kind in KINDS}
    assert not {case for case in found if too_far(found[case], apart[case[0]])}, (found, apart)
    same = {
        (kind, shard): difference(folders[kind, shard], folders[kind, without])
        for kind in KINDS
        for without, shard in (("none", "teacher"), ("student", "both"))
        if without in shards
    }
    assert {case: value for case, value in same.items() if value} == {}, "sharding the teacher"

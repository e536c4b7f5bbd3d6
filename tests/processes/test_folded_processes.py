"""Runs by two processes under a teacher that has a different tokenizer and may be sharded.

`make test-processes` runs it.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from stillhouse.evaluation.results import Evaluation
from tests import forks
from tests.processes.process_runs import difference, finish, recipe, run_all

pytestmark = pytest.mark.processes

SECONDS = 600


def test_two_processes_end_with_the_weights_and_measurements_of_one(tmp_path: Path) -> None:
    inputs = tmp_path / "inputs"
    inputs.mkdir()
    alone = recipe(inputs, tmp_path / "alone", "folded", micro_batch_size=2)
    finish([forks.Fork(run_all, [alone])], SECONDS)
    shards = ("none", "teacher")
    runs = [recipe(inputs, tmp_path / shard, "folded", shard=shard) for shard in shards]
    finish(forks.ranks(2, run_all, runs), SECONDS)
    (file,) = (tmp_path / "alone").glob("stages/evaluate-*/evaluation.json")
    expected = Evaluation.load(file).result("student")
    for shard in shards:
        assert difference(tmp_path / shard, tmp_path / "alone") == 0
        (file,) = (tmp_path / shard).glob("stages/evaluate-*/evaluation.json")
        found = Evaluation.load(file).result("student")
        assert found.fidelity == expected.fidelity
        assert found.own_text.compared == expected.own_text.compared
        assert found.own_text.forward_kl == pytest.approx(expected.own_text.forward_kl, rel=1e-6)


@pytest.mark.parametrize("kind", ["folded chunks", "folded stored"])
def test_two_processes_end_with_the_weights_of_one_for_chunks_and_stores(
    tmp_path: Path, kind: str
) -> None:
    inputs = tmp_path / "inputs"
    inputs.mkdir()
    alone = recipe(inputs, tmp_path / "alone", kind, micro_batch_size=2)
    finish([forks.Fork(run_all, [alone])], SECONDS)
    sharded = recipe(inputs, tmp_path / "sharded", kind, shard="teacher")
    finish(forks.ranks(2, run_all, [sharded]), SECONDS)
    assert difference(tmp_path / "sharded", tmp_path / "alone") == 0

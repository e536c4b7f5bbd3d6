"""A disk fills up while a process writes its part of a checkpoint.

A limit on the size of files stands in for the full disk.
"""

from __future__ import annotations

import resource
import signal
from pathlib import Path

import pytest
import yaml

from stillhouse.launch import process_index
from tests import forks
from tests.processes.process_runs import (
    before_writing,
    difference,
    errors_at_exit,
    one_thread,
    recipe,
)

pytestmark = pytest.mark.processes

LIMIT = 1 << 12
"""Largest file in bytes, smaller than a process's part of the weights."""


def limit_files() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, hard))


def work(path: Path, shard: str, full: int | None) -> None:
    """The work of one process. full: the process whose disk is full at its second checkpoint."""
    one_thread()
    if process_index() == full:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        before_writing("/checkpoint-4/", limit_files)
    forks._stillhouse("run", str(path), "--set", f"train.shard={shard}")


@pytest.mark.parametrize(("shard", "full"), [("both", 0), ("both", 1), ("none", 0)])
def test_a_full_disk_is_one_error_and_the_run_resumes_without_loss(
    tmp_path: Path, shard: str, full: int
) -> None:
    for name in ("undisturbed", "full"):
        raw = recipe(tmp_path, tmp_path / name, "live", micro_batch_size=2)
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(raw))
    expected = errors_at_exit(forks.ranks(2, work, tmp_path / "undisturbed.yaml", shard, None))
    assert not any("error: " in said for said in expected)
    path = tmp_path / "full.yaml"
    said = "".join(errors_at_exit(forks.ranks(2, work, path, shard, full)))
    assert said.count("error: ") == 1, said
    # Errors from torch's own writer have no error number.
    assert "larger than the disk" in said or "the disk is full" in said
    assert "Traceback" not in said
    again = errors_at_exit(forks.ranks(2, work, path, shard, None))
    assert "resuming from step 2 of 6" in again[0]
    assert difference(tmp_path / "full", tmp_path / "undisturbed") == 0

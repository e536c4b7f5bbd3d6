"""Recording a store with several processes under torchrun, each with its share of batches."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path

import pytest
import torch

from stillhouse.data.batches import collate
from stillhouse.launch import leads
from stillhouse.signals.encodings import TopK
from stillhouse.signals.manifest import Manifest, Settings, read_manifest
from stillhouse.signals.store import open_store
from stillhouse.teachers import record_store
from stillhouse.teachers.local_teacher import LocalTeacher, load_teacher
from stillhouse.teachers.model_source import resolve_model
from stillhouse.teachers.record_store import record, segments_of
from stillhouse.teachers.sharded_teacher import load_sharded_teacher
from tests import forks, tiny
from tests.signals import toys

pytestmark = pytest.mark.run

WINDOWS = 7


class Text:
    """Windows of random tokens."""

    def __init__(self) -> None:
        data = toys.batch(windows=WINDOWS, vocabulary=tiny.llama().config.vocab_size)
        self.arrays = {
            "input_ids": data.input_ids_RL,
            "labels": data.labels_RL,
            "position_ids": data.position_ids_RL,
        }

    def __len__(self) -> int:
        return WINDOWS

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {name: values[index] for name, values in self.arrays.items()}


def recorded(folder: Path, out: Path, shards: int = 1) -> None:
    source = resolve_model(str(folder), base=folder)
    teacher: LocalTeacher
    if shards == 1:
        teacher = load_teacher(source, dtype=torch.float32)
    else:
        teacher = load_sharded_teacher(source, dtype=torch.float32, shards=shards)
    teacher.tokens_together = 1  # a batch is one window
    settings = Settings(TopK(8), teacher.vocabulary, {"teacher": "tiny"})
    record(teacher, [Text()], settings, out)


@pytest.mark.parametrize(("processes", "shards"), [(2, 1), (4, 1), (2, 2), (4, 2)])
def test_several_processes_record_the_same_store_as_one(
    tmp_path: Path, processes: int, shards: int
) -> None:
    folder = tiny.save_model(tmp_path / "teacher", seed=0)
    recorded(folder, tmp_path / "one")
    out = tmp_path / "many"
    for rank in forks.ranks(processes, partial(recorded, folder, out, shards)):
        assert rank.wait(timeout=300) == 0, rank.communicate()[1][-3000:]
    one, many = read_manifest(tmp_path / "one"), read_manifest(out)
    assert (many.segments, many.rows) == (one.segments, one.rows)
    assert len(many.shards) == min(processes, WINDOWS)
    text = Text()
    segments = segments_of(collate([text[i] for i in range(WINDOWS)]))
    left, right = (open_store(each).read(segments) for each in (tmp_path / "one", out))
    assert torch.equal(left.ids_NK, right.ids_NK)
    assert torch.equal(left.log_probs_NK, right.log_probs_NK)


def recorded_and_moved(folder: Path, out: Path) -> None:
    """As in a run, the main process moves the store; here, the other processes read it slowly."""
    if not leads():

        def slow_read(path: Path) -> Manifest:
            time.sleep(1)
            return read_manifest(path)

        forks.patch(record_store, "read_manifest", slow_read)
    recorded(folder, out)
    if leads():
        out.rename(out.with_name("finished"))


def test_the_main_process_returns_only_after_all_have_read_the_store(tmp_path: Path) -> None:
    folder = tiny.save_model(tmp_path / "teacher", seed=0)
    for rank in forks.ranks(2, partial(recorded_and_moved, folder, tmp_path / "store")):
        assert rank.wait(timeout=300) == 0, rank.communicate()[1][-3000:]
    assert read_manifest(tmp_path / "finished").rows

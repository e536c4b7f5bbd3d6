"""Rollouts on disk, and as training windows."""

from __future__ import annotations

from pathlib import Path

import pytest

from stillhouse.data.shift import IGNORED
from stillhouse.training.rollouts import (
    Rollout,
    forget_rollouts,
    read_rollouts,
    rollout_batch,
    save_rollouts,
    window_folder,
)

END = 0
FIRST = Rollout(0, (5, 6, 7, 8, END), prompt=2, given=2, stop="stop")
SECOND = Rollout(1, (9, 4, 3), prompt=1, given=2, stop="length")


def test_rollouts_are_read_as_they_were_written(tmp_path: Path) -> None:
    folder = window_folder(tmp_path, 4)
    assert read_rollouts(folder) is None
    save_rollouts(folder, [FIRST, SECOND], "one")
    assert read_rollouts(folder, "one") == [FIRST, SECOND]
    assert read_rollouts(folder, "another") is None
    assert [path.name for path in folder.parent.iterdir()] == ["step-00000004"]


@pytest.mark.parametrize("name", ["tokens.npy", "rollouts.json"])
def test_damaged_rollouts_are_not_read(tmp_path: Path, name: str) -> None:
    folder = window_folder(tmp_path, 0)
    save_rollouts(folder, [FIRST, SECOND], "one")
    data = bytearray((folder / name).read_bytes())
    data[-9] ^= 1
    (folder / name).write_bytes(data)
    assert read_rollouts(folder, "one") is None


def test_rollouts_before_a_step_are_deleted(tmp_path: Path) -> None:
    for step in (0, 4, 8):
        save_rollouts(window_folder(tmp_path, step), [FIRST], "one")
    forget_rollouts(tmp_path, before=4)
    found = sorted(path.name for path in (tmp_path / "rollouts").iterdir())
    assert found == ["step-00000004", "step-00000008"]


def test_the_end_of_an_answer_is_supervised_even_if_it_is_the_padding_token() -> None:
    batch = rollout_batch([[FIRST, SECOND]], 12, pad_id=END)
    assert batch["input_ids"][0].tolist() == [5, 6, 7, 8, END, 9, 4, 3, END, END, END, END]
    skipped = [IGNORED] * 4
    assert batch["labels"][0].tolist() == [
        *[IGNORED, IGNORED, 7, 8, END],
        *[IGNORED, IGNORED, 3],
        *skipped,
    ]
    assert batch["position_ids"][0].tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 0, 1, 2, 3]


def test_answers_that_are_cut_off_are_not_supervised_if_dropped() -> None:
    labels = rollout_batch([[FIRST], [SECOND]], 8, pad_id=END, drop_cut_off=True)["labels"]
    assert labels[0].tolist()[2:5] == [7, 8, END]
    assert set(labels[1].tolist()) == {IGNORED}


def test_no_windows_become_a_row_without_supervised_tokens() -> None:
    batch = rollout_batch([], 8, pad_id=END)
    assert batch["labels"].shape == (1, 8)
    assert set(batch["labels"].flatten().tolist()) == {IGNORED}

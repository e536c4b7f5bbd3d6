"""The rows of each step include a share of own text, for any number of processes."""

from __future__ import annotations

from typing import Any

import pytest

from stillhouse.training.partition import NO_ROW, ProcessBatches
from stillhouse.training.step_rows import Micro, StepRows, StepSampler

LENGTHS = [3, 9, 5, 12, 7, 4, 30]


def rows(**changes: Any) -> StepRows:
    values = {"batch": 8, "share": 0.5, "cold_steps": 0, "rows": 21, "lengths": LENGTHS}
    values |= {"samples": 1, "max_tokens": 8, "context": 32, "seed": 3}
    return StepRows(**{**values, **changes})


@pytest.mark.parametrize("share", [1e-6, 0.1, 0.25, 1 / 3, 0.5, 0.7, 1.0])
def test_every_step_has_the_share_of_own_windows(share: float) -> None:
    """The share is not drawn at random: the counts of two steps differ by at most one."""
    plan = rows(share=share)
    counts = [len(plan.own_windows(step)) for step in range(200)]
    assert max(counts) - min(counts) <= 1
    assert sum(counts) == int(200 * 8 * round(share * 1e6) / 1e6)
    for step in range(20):
        assert len(plan.data_rows(step)) + len(plan.own_windows(step)) == 8


def test_data_rows_have_the_order_of_a_plain_run() -> None:
    plain = ProcessBatches(21, 4, process=0, processes=1, seed=3)
    order = [row for epoch in (0, 1) for row in _epoch(plain, epoch)]
    found = [row for step in range(10) for row in rows().data_rows(step)]
    assert found == order[: len(found)]
    assert len(found) == 40


def _epoch(sampler: ProcessBatches, epoch: int) -> list[int]:
    sampler.set_epoch(epoch)
    return [row for batch in sampler for row in batch]


def test_windows_are_filled_with_prompts_and_room_for_their_answers() -> None:
    plan = rows()
    number = 0
    for step in range(12):
        for window in plan.own_windows(step):
            taken = [LENGTHS[slot.prompt] + slot.room for slot in window]
            assert sum(taken) <= 32
            assert [slot.number for slot in window] == list(range(number, number + len(window)))
            number += len(window)
            room = {LENGTHS[slot.prompt]: slot.room for slot in window}
            assert all(most == min(8, 32 - length) for length, most in room.items())
    prompts = [slot.prompt for slot in plan.slots(0, 12)]
    for start in range(0, len(prompts) - 7, 7):
        assert sorted(prompts[start : start + 7]) == list(range(7))


def test_samples_of_a_prompt_are_consecutive() -> None:
    prompts = [slot.prompt for slot in rows(samples=3).slots(0, 6)]
    for start in range(0, len(prompts) - 2, 3):
        assert len(set(prompts[start : start + 3])) == 1


def test_steps_of_a_cold_start_have_only_data() -> None:
    plan = rows(share=1.0, cold_steps=3)
    assert [len(plan.own_windows(step)) for step in range(5)] == [0, 0, 0, 8, 8]
    assert [len(plan.data_rows(step)) for step in range(5)] == [8, 8, 8, 0, 0]
    assert plan.slots(3, 4)[0].number == 0


@pytest.mark.parametrize("share", [0.3, 0.5, 1.0])
@pytest.mark.parametrize("cold_steps", [0, 2])
@pytest.mark.parametrize(("size", "processes"), [(1, 1), (8, 1), (2, 2), (1, 4), (4, 2)])
def test_every_row_of_a_step_is_in_exactly_one_process(
    share: float, cold_steps: int, size: int, processes: int
) -> None:
    plan = rows(share=share, cold_steps=cold_steps)
    micros = [Micro(size, process, processes) for process in range(processes)]
    samplers = [list(StepSampler(plan, micro, 6)) for micro in micros]
    each = micros[0].most_batches(plan)
    for step in range(6):
        data = [
            row
            for sampler in samplers
            for batch in sampler[step * each : (step + 1) * each]
            for row in batch
            if row != NO_ROW
        ]
        assert sorted(data) == sorted(plan.data_rows(step))
        windows = plan.own_windows(step)
        first = micros[0].batches(len(data))
        own = [
            slot.number
            for micro in micros
            for number in range(each - first)
            for window in micro.part(windows, number)
            for slot in window
        ]
        assert sorted(own) == [slot.number for window in windows for slot in window]

"""The bars, settings, and learning rates of bench/on_policy.py, and when its training ends."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from bench import on_policy
from bench.chat_topics import TOPICS
from bench.on_policy import Budget
from bench.on_policy_settings import (
    Training,
    bars_of,
    own_text,
    parts_of,
    repetition_interval,
)
from bench.on_policy_speed import CONTEXT, windows_of

from stillhouse.training.rollouts import Rollout
from stillhouse.training.step_rows import StepRows


def figures(
    *, repetition: float = 0.2, kl: float = 1.0, logprob: float = -2.0, heldout: float = 0.5
) -> dict[str, Any]:
    return {
        "greedy": {"repetition": repetition, "teacher_logprob": logprob},
        "sampled": {"reverse_kl": kl},
        "heldout": {"kl": heldout},
    }


def test_the_best_setting_is_compared_with_the_mean_of_all_seeds() -> None:
    found = {
        "teacher": figures(kl=0.0),
        "8-0/start": figures(),
        "8-0/teacher_chats": figures(repetition=0.2, kl=1.0),
        "8-1/teacher_chats": figures(repetition=0.4, kl=3.0),
        "8-0/reverse_kl": figures(repetition=0.1, kl=1.0, logprob=-1.0, heldout=0.51),
        "8-1/reverse_kl": figures(repetition=0.2, kl=0.6, logprob=-2.0, heldout=0.52),
        "8-0/jsd": figures(kl=0.0),
        "8-0/student_chats": figures(kl=0.0),
        "8-1/student_chats": figures(kl=0.0),
    }
    bars = list(bars_of(found))
    assert all("width 8, reverse_kl against teacher_chats, 2 seeds" in bar.name for bar in bars)
    assert [bar.value for bar in bars] == pytest.approx([0.5, 0.4, 0.5, 0.015])
    assert [bar.met for bar in bars] == [True, True, True, True]


def test_there_are_no_bars_unless_both_sides_are_measured() -> None:
    assert not list(bars_of({"teacher": figures(), "8-0/reverse_kl": figures()}))
    assert not list(bars_of({"8-0/teacher_chats": figures(), "8-1/reverse_kl": figures()}))


def test_a_setting_is_compared_with_the_teachers_chats_of_the_same_training() -> None:
    found = {
        "8-0/teacher_chats": figures(kl=1.0),
        "8-0/teacher_chats@decay=1@tokens=9": figures(kl=2.0),
        "8-0/jsd": figures(kl=0.9),
        "8-0/jsd@tokens=9@beta=0.9@decay=1": figures(kl=1.0),
        "8-0/reverse_kl@tokens=99": figures(kl=0.1),
    }
    repetition, kl, *_ = bars_of(found)
    assert "jsd@tokens=9@beta=0.9@decay=1 against teacher_chats@decay=1@tokens=9" in kl.name
    assert kl.value == pytest.approx(0.5)
    assert repetition.value == pytest.approx(1.0)


def test_changes_of_a_setting_apply_to_training_sampling_and_divergence() -> None:
    base, changes, training = parts_of("jsd@learning_rate=2e-4@temperature=0.7@beta=0.9")
    assert (base, training) == ("jsd", {"learning_rate": 2e-4})
    own = own_text(base, changes)
    assert own is not None
    assert own["temperature"] == 0.7
    assert own["terms"] == [{"divergence": "jsd", "beta": 0.9}]
    assert own_text("teacher_chats", {}) is None


def test_the_interval_of_repetition_reflects_differences_between_prompts() -> None:
    base = [[(8, 10), (2, 10), (8, 10), (2, 10)]] * 2
    half = [[(4, 10), (1, 10), (4, 10), (1, 10)]] * 2
    assert repetition_interval(half, base) == pytest.approx((0.5, 0.5))
    one_loops = [[(10, 10), (0, 10), (0, 10), (0, 10)]] * 2
    low, high = repetition_interval(one_loops, base)
    assert low == 0.0
    assert 0.5 < high < 2.0


def test_training_ends_when_its_tokens_are_used_up() -> None:
    control = SimpleNamespace(should_training_stop=False)
    stop = Budget(Training(100, 1e-4, decay=0.0))
    for tokens in (None, 99):
        stop.on_log(None, None, control, logs={} if tokens is None else {"tokens": tokens})
        assert not control.should_training_stop
    stop.on_log(None, None, control, logs={"tokens": 104})
    assert control.should_training_stop


def test_the_learning_rate_follows_the_tokens() -> None:
    assert Training(100, 2e-4, decay=0.0).rate(70) == 2e-4
    half = Training(100, 2e-4, decay=0.5)
    rates = [half.rate(done) for done in (0, 4, 50, 75, 100, 104)]
    assert rates == pytest.approx([0.4e-4, 2e-4, 2e-4, 1e-4, 0.0, 0.0])
    optimizer = SimpleNamespace(param_groups=[{"lr": 1.0}])
    state = SimpleNamespace(log_history=[{"tokens": 75}, {"heldout_perplexity": 9.0}])
    Budget(half).on_step_begin(None, state, None, optimizer=optimizer)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-4)


def test_no_topic_is_in_two_parts() -> None:
    topics = [topic for part in TOPICS.values() for topic in part]
    assert len(set(topics)) == len(topics)


def test_pieces_are_made_once_and_only_as_many_as_requested(tmp_path: Path) -> None:
    experiment = object.__new__(on_policy.Experiment)
    experiment.folder, experiment.left = tmp_path, 1
    made: list[str] = []
    for _ in range(2):
        experiment.piece(tmp_path / "a", lambda: made.append("a"))
    with pytest.raises(on_policy.OutOfPiecesError):
        experiment.piece(tmp_path / "b", lambda: made.append("b"))
    assert made == ["a"]


def test_windows_of_answers_are_those_of_the_training_steps() -> None:
    plan = StepRows(
        batch=4,
        share=1.0,
        cold_steps=0,
        rows=1,
        lengths=[20, 60, 33, 52, 58, 49, 24],
        samples=1,
        max_tokens=96,
        context=CONTEXT,
        seed=0,
    )
    slots = plan.slots(0, 3)
    answers = [
        Rollout(slot=slot.number, ids=(1,) * (plan.lengths[slot.prompt] + 2),
                prompt=plan.lengths[slot.prompt], given=plan.lengths[slot.prompt], stop="stop")
        for slot in slots
    ]  # fmt: skip
    found = [[one.slot for one in window] for window in windows_of(answers, 96)]
    steps = [plan.own_windows(step) for step in range(3)]
    assert found == [[slot.number for slot in window] for step in steps for window in step]
    assert {len(window) for window in found} == {1, 2}

"""On-policy distillation: training on text that the student generates."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from stillhouse.data.batches import NoText
from stillhouse.objectives.objective_config import ObjectiveRecipe
from stillhouse.students.student import Student
from stillhouse.teachers.load_model import load_model
from stillhouse.teachers.local_teacher import LocalTeacher
from stillhouse.teachers.several_teachers import SeveralTeachers
from stillhouse.training import draw_rollouts, on_policy, rollouts
from stillhouse.training.checkpoints import METRICS, read_metrics
from stillhouse.training.own_prompts import OwnPrompts
from stillhouse.training.rollouts import ROLLOUTS, Rollout, read_rollouts, window_folder
from stillhouse.training.train import TrainingResult, train
from stillhouse.training.train_config import TrainRecipe
from stillhouse.training.trainer import DistillationTrainer
from tests import forks, tiny
from tests.training.conftest import Setting
from tests.training.test_sharding import teacher_for

pytestmark = pytest.mark.run

KL = ObjectiveRecipe()


def prompts(count: int = 12) -> OwnPrompts:
    """Prompts of different lengths, from 2 to 7 tokens."""
    words = tiny.tokenizer()
    texts = [tiny.text(1, seed=number)[: 2 + number % 6] for number in range(count)]
    return OwnPrompts.of(
        words(f"{number % 10}{text}")["input_ids"] for number, text in enumerate(texts)
    )


def settings(own: dict[str, Any] | None = None, **changes: Any) -> TrainRecipe:
    on_policy = None if own is None else {"max_tokens": 8, "window": 2, **own}
    values = {"batch_size": 4, "precision": "float32", "max_steps": 4, **changes}
    values["on_policy"] = on_policy
    return TrainRecipe.model_validate(values)


def run(
    setting: Setting, out: Path | None, own: dict[str, Any] | None = None, **changes: Any
) -> TrainingResult:
    return train(
        Student.load(setting.student),
        setting.load_teacher(),
        setting.windows,
        KL,
        settings(own, **changes),
        heldout=setting.heldout,
        folder=out,
        prompts=prompts(),
    )


def weights(out: Path) -> dict[str, Tensor]:
    return load_file(out / "model" / "model.safetensors")


def rollouts_at(out: Path, step: int) -> list[Rollout]:
    """The rollouts of the window that begins at a step."""
    found = read_rollouts(window_folder(out, step))
    assert found
    return found


def difference(left: Path, right: Path) -> float:
    ours, theirs = weights(left), weights(right)
    assert ours.keys() == theirs.keys()
    return max(float((ours[name] - theirs[name]).abs().max()) for name in ours)


def test_a_share_of_0_gives_the_weights_of_a_plain_run(setting: Setting, tmp_path: Path) -> None:
    run(setting, tmp_path / "plain")
    run(setting, tmp_path / "own", {"share": 0.0})
    assert difference(tmp_path / "own", tmp_path / "plain") == 0
    assert not (tmp_path / "own" / ROLLOUTS).exists()


def test_a_share_of_1_needs_no_data(setting: Setting, tmp_path: Path) -> None:
    run(setting, tmp_path / "with", {"share": 1.0})
    train(
        Student.load(setting.student),
        setting.load_teacher(),
        NoText(setting.windows.context),
        KL,
        settings({"share": 1.0}),
        folder=tmp_path / "without",
        prompts=prompts(),
    )
    assert difference(tmp_path / "with", tmp_path / "without") == 0
    rows = [row for row in read_metrics(tmp_path / "with" / "metrics.jsonl") if "loss" in row]
    assert all("forward_kl" not in row and row["own_tokens"] == row["tokens"] for row in rows)
    assert [row["loss"] for row in rows] == pytest.approx([row["own_reverse_kl"] for row in rows])


PURE = {"share": 1.0}
HALF = {"share": 0.5}
PHASES = {
    "drawing": (draw_rollouts, "write_answers", 2),
    "writing": (rollouts, "flush_tree", 2),
    "written": (rollouts, "flush", 1),
    "scoring": (LocalTeacher, "answer", 5),
    "learning": (DistillationTrainer, "training_step", 3),
}
"""For each phase, a function that it calls, and the call after which the process is killed."""
STEPS = {"max_steps": 10, "checkpoint_every": 2, "keep_checkpoints": 2}


def killed_in(phase: str, setting: Setting, out: Path) -> None:
    """Trains until the process is killed in a phase."""
    owner, name, last = PHASES[phase]
    work, calls = getattr(owner, name), itertools.count(1)

    def dying(*args: Any, **kwargs: Any) -> Any:
        found = work(*args, **kwargs)
        if next(calls) == last:
            os.kill(os.getpid(), signal.SIGKILL)
        return found

    setattr(owner, name, dying)
    if owner is draw_rollouts:
        forks.patch(on_policy, "write_answers", dying)
    run(setting, out, {**HALF, "window": 3}, **STEPS)


def test_a_run_that_is_killed_in_every_phase_gives_the_same_weights(
    setting: Setting, tmp_path: Path
) -> None:
    """Windows have three steps, but checkpoints are two apart: it also resumes inside windows."""
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    work = partial(run, setting, undisturbed, {**HALF, "window": 3}, **STEPS)
    assert forks.Fork(work).wait() == 0
    for phase in PHASES:
        assert forks.Fork(killed_in, phase, setting, killed).wait() == -signal.SIGKILL, phase
    work = partial(run, setting, killed, {**HALF, "window": 3}, **STEPS)
    assert forks.Fork(work).wait() == 0
    assert difference(killed, undisturbed) == 0
    ignored = {"tokens_per_s", "own_tokens_per_s"}
    rows = [
        [{k: v for k, v in row.items() if k not in ignored} for row in read_metrics(out / METRICS)]
        for out in (undisturbed, killed)
    ]
    assert rows[0] == rows[1]


def test_lost_rollouts_are_generated_again_from_an_earlier_checkpoint(
    setting: Setting, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    section = {**PURE, "window": 4}
    options = {"max_steps": 7, "checkpoint_every": 3, "keep_checkpoints": 3}
    run(setting, tmp_path / "undisturbed", section, **options)
    lost = tmp_path / "lost"
    shutil.copytree(tmp_path / "undisturbed", lost)
    for name in ("model", "checkpoints/checkpoint-7"):
        shutil.rmtree(lost / name)
    tokens = window_folder(lost, 4) / "tokens.npy"
    tokens.write_bytes(tokens.read_bytes()[:-1])
    run(setting, lost, section, **options)
    assert "rollouts of step 6 are missing or damaged" in capfd.readouterr().err
    assert difference(lost, tmp_path / "undisturbed") == 0


def test_own_text_has_no_loss_for_a_student_that_equals_its_teacher(
    setting: Setting, tmp_path: Path
) -> None:
    assert setting.teacher is not None
    same = replace(setting, student=setting.teacher)
    for divergence in ("reverse_kl", "forward_kl", "jsd"):
        own = {**PURE, "terms": [{"divergence": divergence}]}
        result = run(same, tmp_path / divergence, own, max_steps=1)
        row = next(row for row in result.metrics if "loss" in row)
        assert abs(row[f"own_{divergence}"]) < 1e-6
        assert row["grad_norm"] < 1e-5


@pytest.mark.parametrize("micro", [1, 2])
def test_micro_batches_do_not_change_the_gradient(
    setting: Setting, tmp_path: Path, micro: int
) -> None:
    one = run(setting, tmp_path / "one", HALF, max_steps=1)
    many = run(setting, tmp_path / "many", HALF, max_steps=1, micro_batch_size=micro)
    for key in ("loss", "grad_norm", "forward_kl", "own_reverse_kl", "tokens", "own_tokens"):
        values = [[row[key] for row in each.metrics if key in row] for each in (one, many)]
        assert values[0] == pytest.approx(values[1], rel=1e-5), key
    texts = [rollouts_at(tmp_path / name, 0) for name in ("one", "many")]
    assert texts[0] == texts[1]


def test_the_first_step_does_not_depend_on_the_window(setting: Setting, tmp_path: Path) -> None:
    """The text for the first step does not depend on how many steps share a window."""
    one = run(setting, tmp_path / "one", {**PURE, "window": 1}, max_steps=1)
    many = run(setting, tmp_path / "many", {**PURE, "window": 3}, max_steps=3)
    firsts = [next(row for row in each.metrics if "loss" in row) for each in (one, many)]
    assert firsts[0]["loss"] == pytest.approx(firsts[1]["loss"], rel=1e-6)


@pytest.mark.parametrize("shard", ["none", "student", "both"])
def test_two_processes_generate_the_same_rollouts_as_one(
    setting: Setting, tmp_path: Path, shard: str
) -> None:
    options = {"max_steps": 3, "micro_batch_size": 2, "max_grad_norm": 100}
    run(setting, tmp_path / "one", HALF, **options)
    work = partial(run_sharded, setting, tmp_path / "two", HALF, shard=shard, **options)
    for rank in forks.two_ranks(work):
        assert rank.wait(timeout=300) == 0, rank.communicate()[1][-3000:]
    assert difference(tmp_path / "two", tmp_path / "one") < 1e-6
    written = [rollouts_at(tmp_path / name, 2) for name in ("one", "two")]
    assert written[0] == written[1]


def run_sharded(setting: Setting, out: Path, own: dict[str, Any], **changes: Any) -> TrainingResult:
    section = settings(own, **changes)
    return train(
        Student.load(setting.student),
        teacher_for(setting, section),
        setting.windows,
        KL,
        section,
        folder=out,
        prompts=prompts(),
    )


def reference_loss(setting: Setting, out: Path) -> tuple[float, int]:
    """Reverse KL summed over all rollouts token by token, at temperature 1, and the tokens."""
    assert setting.teacher is not None
    student = load_model(setting.student, dtype=torch.float64)
    teacher = load_model(setting.teacher, dtype=torch.float64)
    total, tokens = 0.0, 0
    for rollout in rollouts_at(out, 0):
        ids = torch.tensor([rollout.ids])
        with torch.no_grad():
            log_q = student(ids, use_cache=False).logits[0].log_softmax(-1)
            log_p = teacher(ids, use_cache=False).logits[0].log_softmax(-1)
        rows = slice(rollout.given - 1, len(rollout.ids) - 1)
        total += float((log_q[rows].exp() * (log_q[rows] - log_p[rows])).sum())
        tokens += len(rollout.own)
    return total, tokens


@pytest.mark.parametrize("temperature", [0.5, 1.5])
def test_the_loss_is_the_mean_over_generated_tokens(
    setting: Setting, tmp_path: Path, temperature: float
) -> None:
    """It depends neither on the sampling temperature nor on how rollouts share windows."""
    run(setting, tmp_path, {**PURE, "temperature": temperature}, max_steps=1)
    total, tokens = reference_loss(setting, tmp_path)
    row = next(row for row in read_metrics(tmp_path / METRICS) if "loss" in row)
    assert row["tokens"] == row["own_tokens"] == tokens
    assert row["loss"] == pytest.approx(total / tokens, rel=1e-5)


def test_data_and_own_text_are_both_divided_by_the_tokens_of_the_step(
    setting: Setting, tmp_path: Path
) -> None:
    run(setting, tmp_path, HALF, max_steps=1)
    row = next(row for row in read_metrics(tmp_path / METRICS) if "loss" in row)
    own, data = row["own_tokens"], row["tokens"] - row["own_tokens"]
    mean = (own * row["own_reverse_kl"] + data * row["forward_kl"]) / (own + data)
    assert row["loss"] == pytest.approx(mean, rel=1e-5)


def test_steps_without_supervised_tokens_give_no_nan(
    setting: Setting, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Every answer is cut off after one token and dropped, so that only prompts are left."""
    own = {**PURE, "max_tokens": 1, "cut_off": "drop", "temperature": 0.0}
    result = run(setting, tmp_path, own, max_steps=2)
    assert all(row["loss"] == 0 for row in result.metrics if "loss" in row)
    assert all(bool(torch.isfinite(value).all()) for value in weights(tmp_path).values())
    warned = capfd.readouterr().err
    assert "100% of the student's answers reach train.on_policy.max_tokens (1)" in warned
    assert "nothing is learned from them" in warned


def test_each_window_is_generated_with_the_weights_at_its_start(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(on_policy, "forget_rollouts", lambda *_: None)  # keeps the first window
    own = {**PURE, "temperature": 0.0}
    options = {"max_steps": 4, "learning_rate": 1e-2, "checkpoint_every": 2, "keep_checkpoints": 3}
    run(setting, tmp_path, own, **options)
    for step, folder in ((0, setting.student), (2, tmp_path / "checkpoints" / "checkpoint-2")):
        model = load_model(folder, dtype=torch.float32)
        for rollout in rollouts_at(tmp_path, step)[:4]:
            asked = torch.tensor([rollout.ids[: rollout.given]])
            found = model.generate(asked, max_new_tokens=8, do_sample=False, pad_token_id=0)[0]
            assert found.tolist()[: len(rollout.ids)] == list(rollout.ids)


def test_the_loss_on_own_text_is_the_mean_over_all_teachers(
    setting: Setting, tmp_path: Path
) -> None:
    assert setting.teacher is not None
    one, other = (
        load_model(path, dtype=torch.float32) for path in (setting.teacher, setting.student)
    )
    losses = []
    for number, teachers in enumerate(([one], [other], [one, other])):
        several = SeveralTeachers([LocalTeacher(teacher) for teacher in teachers])
        train(
            Student.load(setting.student),
            several,
            setting.windows,
            KL,
            settings(PURE, max_steps=1),
            folder=tmp_path / str(number),
            prompts=prompts(),
        )
        rows = read_metrics(tmp_path / str(number) / METRICS)
        losses.append(next(row["loss"] for row in rows if "loss" in row))
    assert losses[1] == pytest.approx(0, abs=1e-6)
    assert losses[2] == pytest.approx(losses[0] / 2, rel=1e-5)


def test_the_teacher_generates_the_beginning_of_answers_if_requested(
    setting: Setting, tmp_path: Path
) -> None:
    own = {**PURE, "teacher_tokens": 3, "temperature": 0.0}
    run(setting, tmp_path, own, max_steps=1)
    assert setting.teacher is not None
    teacher = load_model(setting.teacher, dtype=torch.float32)
    for rollout in rollouts_at(tmp_path, 0):
        assert rollout.given == rollout.prompt + 3
        asked = torch.tensor([rollout.ids[: rollout.prompt]])
        found = teacher.generate(asked, max_new_tokens=3, do_sample=False, pad_token_id=0)[0]
        assert found.tolist() == list(rollout.ids[: rollout.given])
        assert len(rollout.own) <= 5


def test_a_cold_start_trains_on_data_first(setting: Setting, tmp_path: Path) -> None:
    own = {**PURE, "cold_start_tokens": 200}
    run(setting, tmp_path / "own", own, max_steps=4)
    run(setting, tmp_path / "plain", max_steps=4)
    rows = [
        [row for row in read_metrics(tmp_path / name / METRICS) if "loss" in row]
        for name in ("own", "plain")
    ]
    assert [row["own_tokens"] > 0 for row in rows[0]] == [False, False, True, True]
    for key in ("loss", "forward_kl", "tokens"):
        assert [row[key] for row in rows[0][:2]] == [row[key] for row in rows[1][:2]]


@pytest.mark.parametrize("far", [0.0, 1e9])
def test_a_large_kl_on_own_text_is_a_warning(
    setting: Setting,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    far: float,
) -> None:
    """It is measured before the first step on own text; the measurement changes no weights."""
    run(setting, tmp_path / "plain", HALF, max_steps=2)
    capfd.readouterr()
    monkeypatch.setattr(on_policy, "FAR", far)
    run(setting, tmp_path / "other", HALF, max_steps=2)
    assert ("times the KL on the data" in capfd.readouterr().err) is (far == 0.0)
    assert difference(tmp_path / "other", tmp_path / "plain") == 0

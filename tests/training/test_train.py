"""The loss and weights of training match references, however rows are split into batches."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import TrainingArguments

from stillhouse.errors import RecipeError, TrainingError
from stillhouse.objectives.objective_config import (
    HiddenStatesTerm,
    LogitsTerm,
    ObjectiveRecipe,
    ObjectiveTerm,
)
from stillhouse.planning.machine import micro_windows
from stillhouse.students.student import Student
from stillhouse.teachers import short_attention
from stillhouse.teachers.load_model import load_model
from stillhouse.training.checkpoints import read_metrics
from stillhouse.training.train import checkpointing_key, plan_batches, train
from stillhouse.training.train_config import TrainRecipe
from stillhouse.training.trainer import DistillationTrainer
from tests import forks
from tests.training.conftest import Setting

pytestmark = pytest.mark.run

KL = ObjectiveRecipe()


def section(**changes: Any) -> TrainRecipe:
    return TrainRecipe(**{"batch_size": 8, "precision": "float32", "max_steps": 4, **changes})


def run(
    setting: Setting, out: Path, objective: ObjectiveRecipe = KL, **changes: Any
) -> dict[str, Tensor]:
    train(
        Student.load(setting.student),
        setting.load_teacher(),
        setting.windows,
        objective,
        section(**changes),
        heldout=setting.heldout,
        folder=out,
    )
    return load_file(out / "model" / "model.safetensors")


def assert_close(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    """AdamW's first steps are close to ±lr per weight, so that a wrong gradient is visible."""
    assert left.keys() == right.keys()
    for name in left:
        torch.testing.assert_close(left[name], right[name], rtol=1e-4, atol=2e-6, msg=name)


def reference_losses(setting: Setting, rows: range) -> tuple[float, float, int]:
    """KL and cross-entropy summed token by token in float64, and the number of tokens."""
    assert setting.teacher is not None
    student = load_model(setting.student, dtype=torch.float64)
    teacher = load_model(setting.teacher, dtype=torch.float64)
    kl = cross_entropy = 0.0
    tokens = 0
    for row in rows:
        window = setting.windows[row]
        batch: dict[str, Any] = {k: window[k][None] for k in ("input_ids", "position_ids")}
        # With a KV cache, transformers would let packed documents attend to each other.
        batch["use_cache"] = False
        with torch.no_grad():
            log_q = student(**batch).logits[0].log_softmax(-1)
            log_p = teacher(**batch).logits[0].log_softmax(-1)
        for t in range(1, len(window["labels"])):
            target = int(window["labels"][t])
            if target != -100:
                p = log_p[t - 1].exp()
                kl += float((p * (log_p[t - 1] - log_q[t - 1])).sum())
                cross_entropy -= float(log_q[t - 1, target])
                tokens += 1
    return kl, cross_entropy, tokens


def test_the_loss_of_the_first_step_is_the_token_mean_of_the_reference(
    setting: Setting, tmp_path: Path
) -> None:
    terms: list[ObjectiveTerm] = [
        LogitsTerm(),
        LogitsTerm(divergence="cross_entropy", weight=0.5),
    ]
    objective = ObjectiveRecipe(terms=terms)
    everything = len(setting.windows)
    run(
        setting,
        tmp_path,
        objective,
        batch_size=everything,
        micro_batch_size=everything,
        max_steps=1,
    )
    kl, cross_entropy, tokens = reference_losses(setting, range(everything))
    row = read_metrics(tmp_path / "metrics.jsonl")[0]
    assert row["tokens"] == tokens == setting.windows.supervised_tokens
    assert row["forward_kl"] == pytest.approx(kl / tokens, rel=1e-5)
    assert row["cross_entropy"] == pytest.approx(cross_entropy / tokens, rel=1e-5)
    assert row["loss"] == pytest.approx((kl + 0.5 * cross_entropy) / tokens, rel=1e-5)


@pytest.mark.parametrize("micro", [1, 2, 4])
def test_gradient_accumulation_does_not_change_the_weights(
    setting: Setting, tmp_path: Path, micro: int
) -> None:
    whole = run(setting, tmp_path / "whole", micro_batch_size=8)
    parts = run(setting, tmp_path / "parts", micro_batch_size=micro)
    assert_close(parts, whole)
    norms = [
        [row["grad_norm"] for row in read_metrics(tmp_path / name / "metrics.jsonl")]
        for name in ("whole", "parts")
    ]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


def test_two_processes_take_the_same_steps_as_one(narrow: Setting, tmp_path: Path) -> None:
    """Gradient norms, held-out values, and final weights are equal, as under torchrun with gloo.

    A term on hidden states has a learned projection, whose gradients must be averaged as well.
    """
    hidden = HiddenStatesTerm(kind="hidden_states", weight=0.1)
    objective = ObjectiveRecipe(terms=[LogitsTerm(), hidden])
    options = {"evaluate_every": 2, "micro_batch_size": 2}
    work = partial(run, narrow, tmp_path / "two", objective, **options)
    for rank in forks.two_ranks(work):
        assert rank.wait(timeout=300) == 0, rank.communicate()[1][-3000:]
    one = run(narrow, tmp_path / "one", objective, **options)
    two = load_file(tmp_path / "two" / "model" / "model.safetensors")
    assert_close(two, one)
    left = {path.name for path in (tmp_path / "two").iterdir()}
    assert left - {"checkpoints"} == {"model", "metrics.jsonl"}
    rows_one, rows_two = (read_metrics(tmp_path / n / "metrics.jsonl") for n in ("one", "two"))
    assert [r["step"] for r in rows_one] == [r["step"] for r in rows_two]
    for a, b in zip(rows_one, rows_two, strict=True):
        for key in a.keys() & {
            "loss",
            "forward_kl",
            "hidden mse",
            "grad_norm",
            "tokens",
            "heldout_kl",
        }:
            assert a[key] == pytest.approx(b[key], rel=1e-4), key


def test_heldout_kl_matches_the_reference(setting: Setting, tmp_path: Path) -> None:
    swapped = Setting(setting.student, setting.teacher, setting.heldout, setting.heldout)
    run(swapped, tmp_path, learning_rate=1e-12, max_steps=1, evaluate_every=1)
    kl, cross_entropy, tokens = reference_losses(swapped, range(len(setting.heldout)))
    row = next(r for r in read_metrics(tmp_path / "metrics.jsonl") if "heldout_kl" in r)
    assert row["heldout_kl"] == pytest.approx(kl / tokens, rel=1e-4)
    assert row["heldout_perplexity"] == pytest.approx(
        float(torch.tensor(cross_entropy / tokens).exp()), rel=1e-4
    )


def test_distillation_lowers_the_kl(setting: Setting, tmp_path: Path) -> None:
    run(setting, tmp_path, epochs=5, max_steps=40, learning_rate=3e-3, evaluate_every=20)
    rows = read_metrics(tmp_path / "metrics.jsonl")
    last = [row["heldout_kl"] for row in rows if "heldout_kl" in row][-1]
    assert last < 0.7 * rows[0]["forward_kl"]


def test_training_without_a_teacher_is_plain_fine_tuning(setting: Setting, tmp_path: Path) -> None:
    alone = Setting(setting.student, None, setting.windows, setting.heldout)
    run(
        alone,
        tmp_path,
        ObjectiveRecipe(terms=[LogitsTerm(divergence="cross_entropy")]),
        evaluate_every=2,
    )
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert rows[0]["loss"] == pytest.approx(rows[0]["cross_entropy"], rel=1e-6)
    assert not any("heldout_kl" in row for row in rows)


def test_early_stop_ends_training_that_does_not_improve(setting: Setting, tmp_path: Path) -> None:
    run(
        setting,
        tmp_path,
        max_steps=30,
        epochs=9,
        learning_rate=0.3,
        schedule="constant",
        warmup=0,
        evaluate_every=1,
        early_stop=2,
        max_grad_norm=100,
    )
    assert read_metrics(tmp_path / "metrics.jsonl")[-1]["step"] < 30


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd", "constant"])
def test_schedules_warm_up_and_decay_as_named(
    setting: Setting, tmp_path: Path, schedule: str
) -> None:
    options: dict[str, Any] = {"max_steps": 10, "epochs": 2, "warmup": 0.2, "learning_rate": 1e-3}
    run(setting, tmp_path, schedule=schedule, **options)
    rates = [row["learning_rate"] for row in read_metrics(tmp_path / "metrics.jsonl")]
    assert rates[0] < max(rates) == pytest.approx(1e-3)
    assert (rates[-1] == max(rates)) == (schedule == "constant")


def test_a_loss_that_is_not_finite_stops_training_and_names_the_step(
    setting: Setting, tmp_path: Path
) -> None:
    steep = {"learning_rate": 1e30, "max_grad_norm": 1e30}  # recipes do not accept such values
    settings = section(max_steps=5, warmup=0).model_copy(update=steep)
    with pytest.raises(TrainingError, match="not finite at step"):
        train(
            Student.load(setting.student),
            setting.load_teacher(),
            setting.windows,
            KL,
            settings,
            folder=tmp_path,
        )


@pytest.mark.parametrize(
    ("options", "processes"),
    [({"batch_size": 8, "micro_batch_size": 3}, 1), ({"batch_size": 3}, 2)],
)
def test_a_batch_that_cannot_be_split_is_rejected(options: dict[str, Any], processes: int) -> None:
    with pytest.raises(RecipeError, match="not a multiple"):
        plan_batches(section(**options), windows=100, processes=processes)


def test_the_default_micro_batch_divides_the_batch_and_has_a_limit_on_a_cpu() -> None:
    assert plan_batches(section(batch_size=12), 100, 1, most_windows=5).micro == 4
    assert plan_batches(section(batch_size=12), 100, 2, most_windows=5).micro == 3
    assert plan_batches(section(batch_size=7), 100, 1, most_windows=5).micro == 1
    assert plan_batches(section(batch_size=12), 100, 1).micro == 12
    given = section(batch_size=12, micro_batch_size=6)
    assert plan_batches(given, 100, 1, most_windows=5).micro == 6
    assert micro_windows("cuda", 4096, torch.bfloat16) is None
    assert micro_windows("cpu", 256, torch.float32) == 1
    assert micro_windows("cpu", 256, torch.bfloat16) == 4
    assert micro_windows("cpu", 4096, torch.float32) == 1


def test_the_plan_counts_steps_over_processes_and_epochs() -> None:
    plan = plan_batches(section(max_steps=None, epochs=2), windows=100, processes=2)
    assert (plan.micro, plan.accumulation, plan.steps) == (4, 1, 26)


def test_every_file_of_the_result_is_a_plain_checkpoint(setting: Setting, tmp_path: Path) -> None:
    run(setting, tmp_path, max_steps=1)
    names = {path.name for path in (tmp_path / "model").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names
    assert not any(name.endswith((".bin", ".pt")) for name in names)
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["use_cache"] is True  # training turns it off, but generation needs it


@dataclass
class Before523:
    gradient_checkpointing: bool = False


@dataclass
class Since523:
    activation_checkpointing: bool = False


@pytest.mark.parametrize("arguments", [Before523, Since523, TrainingArguments])
def test_the_key_for_activation_checkpointing_exists_in_every_transformers_version(
    arguments: Any,
) -> None:
    assert checkpointing_key(arguments) in {field.name for field in fields(arguments)}


class StoppedError(Exception):
    pass


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_attention_is_chosen_by_the_device_that_it_runs_on(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    """Both models are loaded on the CPU, and the trainer moves them to its device."""
    used = []

    def stop(trainer: DistillationTrainer, *_: object) -> None:
        for model in (trainer.student.model, trainer.teacher.model):
            used.append((model.device.type, model.config._attn_implementation))
        raise StoppedError

    def on_device(arguments: TrainingArguments) -> torch.device:
        assert arguments._setup_devices.type == "cpu"
        return torch.device(device)

    monkeypatch.setattr(TrainingArguments, "device", property(on_device))
    monkeypatch.setattr(DistillationTrainer, "train", stop)
    with pytest.raises(StoppedError):
        run(setting, tmp_path, max_steps=1)
    expected = short_attention.NAME if device == "cpu" else "sdpa"
    assert used == [(device, expected), (device, expected)]

"""Training a classifier gives the same result after a kill, or with a damaged checkpoint."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from stillhouse.classify.classifier_students import build_classifier
from stillhouse.classify.classify_config import FitRecipe, TruncatedClassifier
from stillhouse.classify.fit import MODEL, fit
from stillhouse.classify.label_prompts import LabelPrompt
from stillhouse.teachers.model_source import resolve_model
from stillhouse.training.checkpoints import CHECKPOINTS
from stillhouse.training.resuming import Housekeeping
from tests import forks, tiny

TEXTS = [f"text number {number}" for number in range(24)]
SECTION = FitRecipe(
    epochs=2, batch_size=4, learning_rate=1e-3, precision="float32", checkpoint_every=3
)


def student(folder: Path) -> Path:
    teacher = resolve_model(str(tiny.save_model(folder / "teacher")), base=folder)
    prompt = LabelPrompt({"pets": "pets", "food": "food"}, None, "{text}", "{label}")
    section = TruncatedClassifier(start="truncated", layers=1)
    out = folder / "student"
    build_classifier(section, teacher, teacher, prompt, [], max_tokens=32, seed=0, out=out)
    return out


def train(start: Path, out: Path) -> None:
    chance = torch.Generator().manual_seed(0)
    targets_NC = torch.rand(len(TEXTS), 2, generator=chance).softmax(-1)
    out.mkdir(exist_ok=True)
    fit(start, TEXTS, targets_NC, section=SECTION, seed=0, out=out)


def train_until_killed(start: Path, out: Path, step: int) -> None:
    """Train until a step at which the process kills itself with SIGKILL, so nothing is flushed."""
    housekeeping = Housekeeping.on_step_end

    def dies(self: Any, args: Any, state: Any, control: Any, **more: Any) -> None:
        housekeeping(self, args, state, control, **more)
        if state.global_step == step:
            os.kill(os.getpid(), signal.SIGKILL)

    forks.patch(Housekeeping, "on_step_end", dies)
    train(start, out)


@pytest.mark.run
def test_resumed_training_ends_with_the_same_weights(
    tmp_path: Path,
) -> None:
    start = student(tmp_path)
    train(start, tmp_path / "whole")
    # There are 12 steps, with a checkpoint after every third, so step 8 resumes from step 6.
    process = multiprocessing.get_context("fork").Process(
        target=train_until_killed, args=(start, tmp_path / "killed", 8)
    )
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not (tmp_path / "killed" / MODEL).exists()
    train(start, tmp_path / "killed")
    whole, resumed = (
        load_file(tmp_path / name / MODEL / "model.safetensors") for name in ("whole", "killed")
    )
    assert whole.keys() == resumed.keys()
    for name, tensor in whole.items():
        assert torch.equal(tensor, resumed[name]), name


def test_training_falls_back_from_a_checkpoint_that_does_not_load(tmp_path: Path) -> None:
    start = student(tmp_path)
    out = tmp_path / "out"
    train(start, out)
    whole = (out / MODEL / "model.safetensors").read_bytes()
    shutil.rmtree(out / MODEL)
    weights = out / CHECKPOINTS / "checkpoint-12" / "model.safetensors"
    weights.write_bytes(b"?" * weights.stat().st_size)
    train(start, out)
    assert (out / MODEL / "model.safetensors").read_bytes() == whole
    left = sorted(path.name for path in (out / CHECKPOINTS).iterdir())
    assert left == ["checkpoint-12", "checkpoint-9", "damaged-checkpoint-12"]

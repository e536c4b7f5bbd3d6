"""Memory of a training step: the teacher's weights are dropped while the student is trained."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from stillhouse.objectives.objective_config import ObjectiveRecipe
from stillhouse.students.student import Student
from stillhouse.teachers.load_model import load_model
from stillhouse.teachers.local_teacher import LocalTeacher
from stillhouse.teachers.mapped_weights import MappedWeights
from stillhouse.training.train import train
from stillhouse.training.train_config import TrainRecipe
from tests import tiny
from tests.teachers.test_mapped_weights import PAGES, pages, resident_pages
from tests.training.conftest import Setting

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or not os.access(PAGES, os.R_OK),
    reason="needs a readable /proc/self/pagemap",
)
TOKENS, WINDOWS = 256, 8
WIDTH, VOCABULARY = 576, 16384


def trained(setting: Setting) -> tuple[list[Tensor], LocalTeacher]:
    """The trained student's weights, and the teacher after training."""
    student, teacher = Student.load(setting.student), setting.load_teacher()
    assert teacher is not None
    recipe = TrainRecipe(batch_size=8, micro_batch_size=4, precision="float32", max_steps=2)
    train(student, teacher, setting.windows, ObjectiveRecipe(), recipe)
    return [weight.detach() for weight in student.model.parameters()], teacher


@pytest.mark.run
def test_the_teachers_mapped_layers_are_in_memory_only_while_they_run(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wide = {"hidden_size": 256, "intermediate_size": 1024}
    setting = replace(setting, teacher=tiny.save_model(tmp_path / "teacher", **wide))
    weights, teacher = trained(setting)
    layers = [*teacher.model.model.layers.parameters()]
    all_pages = sum(map(pages, layers))
    # Linux also maps pages next to those that are used, and the head follows the layers.
    assert all_pages > 1000
    assert resident_pages(layers) < 50
    monkeypatch.setattr(MappedWeights, "release", lambda self: None)
    others, teacher = trained(setting)
    assert resident_pages(teacher.model.model.layers.parameters()) >= all_pages
    assert all(torch.equal(*pair) for pair in zip(weights, others, strict=True))


PROGRAM = """
import json, sys
from pathlib import Path
from tests.training.test_training_memory import measured
print(json.dumps(measured(Path(sys.argv[1]))))
"""


def model(ffn_size: int) -> Any:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=ffn_size,
        num_hidden_layers=12,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


def measured(folder: Path) -> dict[str, int]:
    """Peak memory in bytes while two steps are trained, and the memory before."""
    from bench.peer_own import Chunks

    from stillhouse.hardware import peak_memory_bytes, reset_peak_memory, tune_allocator

    tune_allocator()
    start = peak_memory_bytes()
    student = Student(load_model(folder / "student", dtype=torch.float32))
    model = load_model(folder / "teacher", dtype=torch.float32)
    teacher = LocalTeacher(model, source=folder / "teacher")
    ids_RL = torch.randint(VOCABULARY, (WINDOWS, TOKENS)).numpy()
    recipe = TrainRecipe(batch_size=WINDOWS // 2, precision="float32")
    reset_peak_memory()
    train(student, teacher, Chunks(ids_RL), ObjectiveRecipe(), recipe)
    return {"start": start, "peak": peak_memory_bytes()}


@pytest.mark.slow
def test_training_takes_little_more_memory_than_the_students_own(tmp_path: Path) -> None:
    """The limit is weights, gradients, two moments, and what the loss needs, plus 15% for
    activations and gaps in the heap. That margin is smaller than the teacher."""
    sizes = {}
    for name, ffn_size in (("student", 1024), ("teacher", 1536)):
        made = model(ffn_size)
        made.save_pretrained(tmp_path / name)
        sizes[name] = sum(4 * weight.numel() for weight in made.parameters())
        del made
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    own = 4 * sizes["student"]  # weights, gradients, and two moments
    logits = 2 * 4 * TOKENS * VOCABULARY
    heads = 3 * 4 * WIDTH * VOCABULARY  # gradients of head and embeddings, and the teacher's head
    libraries = 100e6
    assert found["peak"] - found["start"] <= 1.15 * (own + logits + heads + libraries), found

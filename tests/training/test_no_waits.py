"""Between two logs, the host never waits for the accelerator; a fake device records waits.

Each scenario trains two optimizer steps of two micro-batches in one process; waits are recorded
during the second one, from its first batch to its end.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from transformers import TrainerCallback, TrainingArguments

from stillhouse.data.data import Data
from stillhouse.data.windows import WindowSet
from stillhouse.objectives.objective_config import (
    AttentionRelationsTerm,
    HiddenStatesTerm,
    LogitsTerm,
)
from stillhouse.python_api import record
from stillhouse.signals.encodings import FrozenHead, Hidden, Sampled, TopK
from stillhouse.signals.manifest import Settings
from stillhouse.students.student import Student
from stillhouse.teachers import packed_attention, record_store
from stillhouse.teachers.attention_checks import masked_attention
from stillhouse.teachers.local_teacher import LocalTeacher
from stillhouse.teachers.several_teachers import SeveralTeachers
from stillhouse.teachers.stored_head import head_sha256
from stillhouse.teachers.teacher import Teacher
from stillhouse.training.trainer import DistillationTrainer
from tests import tiny
from tests.fake_device import FakeDevice, register
from tests.forks import Fork

pytestmark = pytest.mark.run
LAYERS = 2
DENSE = [LogitsTerm(temperature=2.0), LogitsTerm(divergence="cross_entropy", weight=0.5)]
INNER = [
    LogitsTerm(divergence="jsd"),
    LogitsTerm(layers=[1]),
    HiddenStatesTerm(kind="hidden_states"),
    AttentionRelationsTerm(kind="attention_relations", heads=2),
]
SCENARIOS: dict[str, Any] = {
    "dense": (None, DENSE),
    "adaptive": (None, [LogitsTerm(divergence="adaptive_kl")]),
    "inner layers": (None, INNER),
    "data alone": ("none", [LogitsTerm(divergence="cross_entropy")]),
    "several teachers": ("several", [LogitsTerm()]),
    "sparse": (TopK(8), [LogitsTerm(divergence="reverse_kl")]),
    "sampled": (Sampled(16), [LogitsTerm()]),
    "frozen head": (FrozenHead(32), [LogitsTerm()]),
    "hidden store": (Hidden((LAYERS,), 32), [LogitsTerm()]),
}
MASKS = "find_packed_sequence_indices"
"""The function in transformers that every SDPA mask needs; it waits to read a condition."""


class RecordSecondStep(TrainerCallback):
    def __init__(self, device: FakeDevice) -> None:
        self.device = device

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        self.device.recording = state.global_step == 1


class OnFakeDevice(DistillationTrainer):
    device: torch.device

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        for state in (PartialState, AcceleratorState):
            state._shared_state["device"] = self.args.device


class Arguments(TrainingArguments):
    found: torch.device

    @property
    def device(self) -> torch.device:
        assert self._setup_devices.type == "cpu"
        return self.found


def teacher_of(kind: Any, student: Student, data: Data, folder: Path) -> Teacher | None:
    local = LocalTeacher(tiny.llama(num_hidden_layers=LAYERS), tiny.tokenizer())
    if kind is None:
        return local
    if kind == "none":
        return None
    if kind == "several":
        other = tiny.llama(3, num_hidden_layers=LAYERS)
        return SeveralTeachers([local, LocalTeacher(other, tiny.tokenizer())])
    if isinstance(kind, FrozenHead):
        head = student.frozen_head
        assert head is not None
        settings = Settings(kind, local.vocabulary, {"head": head_sha256(head)}, 1.0, 0)
        record_store.record(local, [data.train], settings, folder, student_head=head)
        return Teacher.stored(folder)
    return record(local, data, folder, encoding=kind)


def watch(folder: Path, names: list[str], packed: bool) -> None:
    """Writes the waits and the loss of each scenario to a file."""
    torch.set_num_threads(1)
    lines = tiny.text(120).splitlines()
    data = Data.build(lines, tiny.tokenizer(), context=32, heldout_tokens=128)
    made = {}
    for name in names:
        kind, terms = SCENARIOS[name]
        model = tiny.llama(1, tie_word_embeddings=False, num_hidden_layers=LAYERS)
        student = Student(model, tiny.tokenizer())
        student.trainable(freeze_head=isinstance(kind, FrozenHead))
        made[name] = student, teacher_of(kind, student, data, folder / name), terms
    if packed:
        packed_attention.varlen_kernel = lambda: masked_attention
        packed_attention._instead_of_sdpa = lambda *_: packed_attention.NAME
    Arguments.found = register()
    found = {}
    for name, parts in made.items():
        with FakeDevice() as device:
            rows = train(*parts, data.train, folder / name, device)
        found[name] = {"waits": device.waits, "loss": rows[-1]["loss"]}
    (folder / "found.json").write_text(json.dumps(found))


def train(
    student: Student,
    teacher: Teacher | None,
    terms: list[Any],
    windows: WindowSet,
    folder: Path,
    device: FakeDevice,
) -> list[dict[str, Any]]:
    trainer = OnFakeDevice(
        student,
        teacher,
        terms,
        args=Arguments(
            str(folder / "out"),
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            max_steps=2,
            logging_steps=2,
            logging_nan_inf_filter=False,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            dataloader_pin_memory=False,
        ),
        train_dataset=windows,
        callbacks=[RecordSecondStep(device)],
    )
    trainer.train()
    return list(trainer.metrics.rows)


def watched(folder: Path, names: list[str], packed: bool) -> Any:
    process = Fork(watch, folder, names, packed)
    assert process.wait(timeout=300) == 0, process.communicate()[1][-3000:]
    return json.loads((folder / "found.json").read_text())


def test_no_step_waits_for_the_device(tmp_path: Path) -> None:
    for name, found in watched(tmp_path, list(SCENARIOS), packed=True).items():
        assert not found["waits"], f"{name}: {len(found['waits'])}; {found['waits'][0]}"
        assert 0 < found["loss"] < 20


def test_with_sdpa_only_transformers_masks_wait(tmp_path: Path) -> None:
    """There is one wait in each forward pass of the student and of a live teacher."""
    found = watched(tmp_path, ["dense", "sparse"], packed=False)
    for name, models in (("dense", 2), ("sparse", 1)):
        waits = found[name]["waits"]
        assert len(waits) == 2 * models
        assert all(MASKS in each for each in waits)


def waiting(folder: Path) -> None:
    """Counts the waits of operations of every kind that waits, and of some that do not."""
    device = register()
    counts = {}
    with FakeDevice() as fake:
        numbers = torch.arange(6.0, device=device)
        out = torch.empty(6)
        fake.recording = True
        kinds = {
            "item": lambda: numbers.sum().item(),
            "float": lambda: float(numbers[0]),
            "if": lambda: bool((numbers > 9).any()),
            "list": lambda: numbers.tolist(),
            "mask": lambda: numbers[numbers > 2],
            "nonzero": lambda: numbers.nonzero(),
            "to the host": lambda: numbers.cpu(),
            "copy to the host": lambda: out.copy_(numbers),
            "new on the device": lambda: torch.tensor(3, device=device),
            "to the device": lambda: torch.zeros(3).to(device),
            "arithmetic": lambda: (numbers * 2).clamp(min=1).cumsum(0),
            "indices": lambda: numbers[torch.ones(2, dtype=torch.long, device=device)],
            "made there": lambda: torch.zeros(3, device=device),
            "without blocking": lambda: torch.zeros(3).to(device, non_blocking=True),
        }
        for name, work in kinds.items():
            fake.waits.clear()
            work()
            counts[name] = len(fake.waits)
    (folder / "counts.json").write_text(json.dumps(counts))


def test_the_fake_device_records_exactly_the_operations_that_wait(tmp_path: Path) -> None:
    process = Fork(waiting, tmp_path)
    assert process.wait(timeout=120) == 0, process.communicate()[1][-3000:]
    counts = json.loads((tmp_path / "counts.json").read_text())
    free = ("arithmetic", "indices", "made there", "without blocking")
    assert {name for name, count in counts.items() if not count} == set(free)

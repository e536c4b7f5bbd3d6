"""The trainings of bench/cross_tokenizer.py: one loop for all settings, with checkpoints.

Shapes: R windows, L student tokens, M teacher tokens, P positions, N supervised rows,
D hidden width, G chunks.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import get_scheduler

import stillhouse as sh
from bench.cross_tokenizer_starts import Experiment, Start
from bench.sorted_losses import Gold, Side, uld
from stillhouse.data.batches import Batch, collate, positions_of, targets_of
from stillhouse.data.shift import IGNORED
from stillhouse.objectives import Term, fused_loss
from stillhouse.objectives.objective_config import ChunksTerm, LogitsTerm, ObjectiveTerm
from stillhouse.students.student import Student
from stillhouse.teachers.aligned_teacher import AlignedTeacher
from stillhouse.teachers.backbone import hidden_states, lm_head
from stillhouse.teachers.local_teacher import LocalTeacher

CHUNKS_AT_A_TIME = 32
CHECKPOINT_EVERY = 10
SORTED = {"uld": (1.5, 1.0), "gold": (1.0, 0.0), "gold_and_data": (0.5, 0.5)}
"""The weights of the sorted loss and of cross-entropy."""


def learner(
    setting: str, student: Student, start: Start, shared: Experiment
) -> Callable[[Batch], float]:
    """A function that adds a batch's gradients, and returns its loss."""
    if setting in SORTED:
        return sorted_learner(setting, student, shared)
    of_data = setting == "cross_entropy"
    name, _, more = setting.partition("_and_")
    teacher = None if of_data else start.teachers[name]()
    terms: list[ObjectiveTerm] = [
        LogitsTerm(divergence="cross_entropy" if of_data else "forward_kl")
    ]
    if more == "chunks":
        terms.append(ChunksTerm(kind="chunks"))
    if more == "data":
        terms = [
            LogitsTerm(divergence=each, weight=0.5) for each in ("forward_kl", "cross_entropy")
        ]
    distillation = sh.Distillation(student, terms, teacher)
    if isinstance(teacher, AlignedTeacher):
        teacher.prepare(distillation.objective.needs, start.data.train)

    def learn(batch: Batch) -> float:
        view = None if teacher is None else teacher.answer(batch)
        with autocast(shared):
            loss = distillation(batch, view)
        (loss.total / loss.rows).backward()
        return float(loss.total.detach()) / loss.rows

    return learn


def sorted_learner(setting: str, student: Student, shared: Experiment) -> Callable[[Batch], float]:
    aligned = AlignedTeacher(shared.other, student.tokenizer)
    aligner = aligned.aligner
    distance: Any = uld
    if setting != "uld":
        distance = Gold.of(aligner.student, aligner.teacher, aligner.partners[0])
    weight, of_data = SORTED[setting]

    def learn(batch: Batch) -> float:
        """A few chunks at a time, whose gradients are added up in the hidden rows."""
        head = lm_head(student.model)
        with autocast(shared):
            hidden_RLD = hidden_states(student.model, batch["input_ids"], batch["position_ids"])
        hidden_PD = hidden_RLD.detach().flatten(0, 1).float().requires_grad_()
        ours, theirs = sides(batch, hidden_PD, head, aligned, shared.other)
        count, total = len(ours.first_G), 0.0
        for low in range(0, count, CHUNKS_AT_A_TIME):
            with autocast(shared):
                loss = distance(ours, theirs, slice(low, low + CHUNKS_AT_A_TIME))
            (loss * (weight / count)).backward()
            total += float(loss.detach()) * weight / count
        if of_data:
            rows_ND, targets_N = hidden_PD[positions_of(batch)], targets_of(batch)
            terms = [Term("cross_entropy", of_data)]
            with autocast(shared):
                found = fused_loss(rows_ND, head, terms, targets_N=targets_N)
            (found.total / found.rows).backward()
            total += float(found.total.detach()) / found.rows
        assert hidden_PD.grad is not None
        hidden_RLD.backward(hidden_PD.grad.view_as(hidden_RLD).to(hidden_RLD.dtype))
        return total

    return learn


def sides(
    batch: Batch, hidden_PD: Tensor, head: sh.LMHead, aligned: AlignedTeacher, teacher: LocalTeacher
) -> tuple[Side, Side]:
    """Both models' views of the chunks of a batch. hidden_PD: the student's, of all positions."""
    rewritten = aligned.rewritten(batch)
    theirs = rewritten.batch
    with torch.no_grad():
        read_RMD = hidden_states(teacher.model, theirs["input_ids"], theirs["position_ids"])
    found = []
    rows = [batch[name].numpy() for name in ("input_ids", "position_ids", "labels")]
    chunks = [
        aligned.aligner.chunks(window, ids_L, positions_L, labels_L != IGNORED)
        for window, ids_L, positions_L, labels_L in zip(rewritten.windows, *rows, strict=True)
    ]
    for rows_PD, ids_RX, head_of, places in (
        (hidden_PD, batch["input_ids"], head, [each.student_C2 for each in chunks]),
        (read_RMD.flatten(0, 1), theirs["input_ids"], teacher.head, [c.teacher_C2 for c in chunks]),
    ):
        size = ids_RX.shape[1]
        every_G2 = torch.cat([torch.from_numpy(p) + size * r for r, p in enumerate(places)])
        count_G = every_G2[:, 1] - every_G2[:, 0]
        targets_P = ids_RX.flatten().roll(-1)
        found.append(Side(rows_PD, targets_P, every_G2[:, 0] - 1, count_G, head_of))
    return found[0], found[1]


def autocast(shared: Experiment) -> torch.autocast:
    narrow = shared.dtype != torch.float32
    return torch.autocast(shared.device.type, shared.dtype, enabled=narrow, cache_enabled=False)


def train(setting: str, start: Start, shared: Experiment, folder: Path, seed: int) -> Student:
    """Some epochs over the text; a killed training resumes from its last checkpoint."""
    torch.manual_seed(seed)
    student = Student.load(start.folder)
    student.trainable()
    weights = [each for each in student.model.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(
        weights, lr=start.learning_rate, betas=(0.9, 0.95), weight_decay=0
    )
    size, epochs, windows = shared.options.batch, shared.options.epochs, len(start.data.train)
    steps = epochs * windows // size
    warmup = max(1, steps // 20)
    schedule = get_scheduler("cosine", optimizer, warmup, steps)
    checkpoint, done, losses = folder / "checkpoint.pt", 0, []
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        student.model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        done, losses = state["done"], state["losses"]
    learn = learner(setting, student, start, shared)
    generator = torch.Generator().manual_seed(seed)
    order = torch.cat([torch.randperm(windows, generator=generator) for _ in range(epochs)])
    for step in range(done, steps):
        student.model.train()
        chosen = order[step * size : (step + 1) * size].tolist()
        losses.append(learn(collate([start.data.train[i] for i in chosen])))
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if (step + 1) % CHECKPOINT_EVERY == 0:
            print(f"    step {step + 1} of {steps}: loss {losses[-1]:.4f}", flush=True)
            state = {"model": student.model.state_dict(), "optimizer": optimizer.state_dict()}
            state |= {"schedule": schedule.state_dict(), "done": step + 1, "losses": losses}
            torch.save(state, folder / "writing.pt")
            (folder / "writing.pt").rename(checkpoint)
    student.model.eval()
    (folder / "losses.json").write_text(json.dumps(losses), encoding="utf-8")
    return student

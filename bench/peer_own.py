"""A training with Stillhouse, for `bench.peers`: python -m bench.peer_own JOB.json.

The counterpart of `peer_trainers`, with the same job file and the same lines on standard output.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback

from bench.peer_trainers import Report, peak_bytes, say
from stillhouse.data.batches import Batch
from stillhouse.hardware import tune_allocator
from stillhouse.objectives.objective_config import ObjectiveRecipe
from stillhouse.students.student import Student
from stillhouse.teachers.local_teacher import load_teacher
from stillhouse.teachers.model_source import resolve_model
from stillhouse.training.train import train
from stillhouse.training.train_config import TrainRecipe


class Chunks:
    """Windows of a text, each a separate document. All tokens except the first are supervised."""

    def __init__(self, windows_RL: np.ndarray) -> None:
        self.windows_RL = torch.from_numpy(windows_RL.astype(np.int64))
        self.context = int(windows_RL.shape[1])
        self.supervised_tokens = len(windows_RL) * (self.context - 1)

    def __len__(self) -> int:
        return len(self.windows_RL)

    def __getitem__(self, index: int, /) -> Batch:
        ids_L = self.windows_RL[index]
        labels_L = ids_L.clone()
        labels_L[0] = -100
        positions_L = torch.arange(self.context)
        return {"input_ids": ids_L, "labels": labels_L, "position_ids": positions_L}


def recipe(job: dict[str, Any]) -> TrainRecipe:
    return TrainRecipe(
        max_steps=job["steps"],
        batch_size=job["batch"],
        micro_batch_size=job["micro"],
        learning_rate=job["learning_rate"],
        schedule="constant",
        warmup=0.0,
        precision="float32",
        checkpoint_every=job["checkpoint_every"],
    )


def main(path: Path) -> None:
    job = json.loads(path.read_text(encoding="utf-8"))
    torch.set_num_threads(job["threads"])
    tune_allocator()
    out = Path(job["out"])
    student = Student.load(Path(job["student"]))
    teacher = load_teacher(resolve_model(job["teacher"], base=Path.cwd()), dtype=torch.float32)
    windows = Chunks(np.load(job["windows"])[: job["steps"] * job["batch"]])
    checkpoints = sorted((out / "checkpoints").glob("checkpoint-*"))
    say(resumes_from=checkpoints[-1].name if checkpoints else None)
    report: TrainerCallback = Report()
    train(
        student,
        teacher,
        windows,
        ObjectiveRecipe(),
        recipe(job),
        seed=job["seed"],
        folder=out,
        callbacks=[report],
    )
    say(saved=True, whole_peak=peak_bytes())


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""Save a trained student as a plain model folder that is complete or absent."""

from __future__ import annotations

import shutil
from pathlib import Path

from stillhouse.errors import ModelError, TrainingError
from stillhouse.launch import leads
from stillhouse.students.student import Student
from stillhouse.teachers.load_model import check_loadable
from stillhouse.teachers.older_names import save_tokenizer
from stillhouse.teachers.quiet import quiet
from stillhouse.training.trainer import DistillationTrainer


def save_trained(trainer: DistillationTrainer, student: Student, folder: Path) -> None:
    """Every process must call this. Raises TrainingError if weights are missing."""
    if folder.is_file():  # transformers would only log it
        raise TrainingError(
            "there is a file where the folder of the trained model should be",
            where=folder,
            fix="move it away, and run the same command again: the checkpoints are kept",
        )
    unfinished = folder.with_name(f"unfinished-{folder.name}")
    if leads():
        shutil.rmtree(unfinished, ignore_errors=True)
    with quiet():
        trainer.save_model(str(unfinished))
    if not leads():
        return
    try:
        check_loadable(student.checkpoint(unfinished))
    except ModelError as error:
        raise TrainingError(
            f"the trained model was not saved: {error.what}",
            where=unfinished,
            fix="the checkpoints are kept: run the same command again",
        ) from error
    if student.tokenizer is not None:
        save_tokenizer(student.tokenizer, unfinished)
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.rename(folder)

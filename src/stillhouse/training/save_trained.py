"""Saving of a trained student as a plain model folder that is either complete or absent."""

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
    """Save the trained student. Every process must call this.

    Raises TrainingError if the saved model is not complete, or `folder` is a file.
    """
    if folder.is_file():  # transformers would only log it
        raise TrainingError(
            "there is a file where the trained model's folder should be",
            where=folder,
            fix="move it elsewhere, and run the same command again; the checkpoints are kept",
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
            fix="run the same command again; the checkpoints are kept",
        ) from error
    if student.tokenizer is not None:
        save_tokenizer(student.tokenizer, unfinished)
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.rename(folder)

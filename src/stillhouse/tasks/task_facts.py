"""A task's teacher and texts, as its stages, keys, and model card identify them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stillhouse.generation.generation_config import TaskTeacher
from stillhouse.runfolder import Stage
from stillhouse.tasks.labeled_texts import files_sha256
from stillhouse.tasks.task_texts_config import TaskTextsRecipe
from stillhouse.teachers.model_source import ModelSource, resolve_model


def task_teacher(section: TaskTeacher, base: Path) -> ModelSource | None:
    """The local model that answers; None for an API. Raises ModelError."""
    if section.model is None:
        return None
    return resolve_model(
        section.model, revision=section.revision, base=base, trusted=section.trust_remote_code
    )


def texts_key(
    section: TaskTextsRecipe, base: Path, *, seed: int, examples: list[str], unread: str
) -> dict[str, Any]:
    """The key of the stage `texts`, in every task.

    examples: texts in the teacher's prompt. unread: the key of `data` that the stage does not
    depend on.
    """
    key: dict[str, Any] = {
        "recipe": section.model_dump(mode="json", exclude={unread}),
        "files": files_sha256([*section.texts, *section.test], base),
        "seed": seed,
    }
    return {**key, "examples": examples} if examples else key


def text_files(section: TaskTextsRecipe) -> str:
    return ", ".join(file.path for file in [*section.texts, *section.test])


def card_hashes(teacher: ModelSource | None, texts: Stage, **others: str) -> dict[str, str]:
    """The hashes by which a model card identifies the student's origins."""
    known = {} if teacher is None else {"teacher": teacher.fingerprint}
    return {**known, "texts": texts.digest, **others}

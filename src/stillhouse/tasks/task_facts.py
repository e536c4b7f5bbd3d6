"""A task's teacher and texts, as its stages, keys, and model card identify them; and the facts that
are needed to use its student."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

from stillhouse.atomic_files import write_atomically
from stillhouse.checksums import sha
from stillhouse.data.file_search import find_files
from stillhouse.errors import ModelError
from stillhouse.generation.generation_config import TaskTeacher
from stillhouse.runfolder import Stage
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
        "files": [
            sha(path)
            for file in (*section.texts, *section.test)
            for path in find_files(file.path, base)
        ],
        "seed": seed,
    }
    return {**key, "examples": examples} if examples else key


def text_files(section: TaskTextsRecipe) -> str:
    return ", ".join(file.path for file in [*section.texts, *section.test])


def card_hashes(teacher: ModelSource | None, texts: Stage, **others: str) -> dict[str, str]:
    """The hashes by which a model card identifies the student's origins."""
    known = {} if teacher is None else {"teacher": teacher.fingerprint}
    return {**known, "texts": texts.digest, **others}


@dataclass(frozen=True)
class StudentFacts:
    """Everything needed to use a task's student, in a JSON file next to its weights."""

    FILE: ClassVar[str]
    STUDENT: ClassVar[str]
    """The student in words, for messages."""

    def save(self, folder: Path) -> None:
        text = json.dumps(asdict(self), ensure_ascii=False, indent=2)
        write_atomically(folder / self.FILE, text)

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Load the facts from a model's folder. Raises ModelError."""
        try:
            return cls(**json.loads((folder / cls.FILE).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise ModelError(
                f"this folder does not contain {cls.STUDENT} ({error})",
                where=folder / cls.FILE,
                fix="use the run folder of a recipe with `task`, or its model",
            ) from None

"""Checks that two models have the same tokens with the same ids."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

from stillhouse.errors import ModelError
from stillhouse.section import require_tokenizer


@dataclass(frozen=True)
class VocabularyMatch:
    """The ids that two models share.

    rows: ids 0 to rows - 1 mean the same in both models; the rest is padding, never predicted.
    teacher_padding, student_padding: number of padding rows in each head.
    warnings: differences that do not prevent distillation.
    """

    rows: int
    teacher_padding: int
    student_padding: int
    warnings: tuple[str, ...] = ()


def check_same_vocabulary(
    teacher_tokenizer: Any, student_tokenizer: Any, *, teacher_rows: int, student_rows: int
) -> VocabularyMatch:
    """Compare two tokenizers' token → id maps, including special tokens.

    teacher_rows, student_rows: rows of each model's head, which is often padded beyond the map.
    Raises ModelError: the maps differ, or a model has fewer rows than its tokenizer has ids.
    """
    check_same_ids(teacher_tokenizer, student_tokenizer)
    rows = check_rows(teacher_tokenizer, teacher_rows, "teacher")
    check_rows(student_tokenizer, student_rows, "student")
    return VocabularyMatch(
        rows=rows,
        teacher_padding=teacher_rows - rows,
        student_padding=student_rows - rows,
        warnings=tuple(_warnings(teacher_tokenizer, student_tokenizer)),
    )


def token_count(tokenizer: Any) -> int:
    """The tokenizer's largest id, plus 1. Raises ModelError if it is not a tokenizer."""
    require_tokenizer(tokenizer)
    return int(max(tokenizer.get_vocab().values())) + 1


def check_rows(tokenizer: Any, rows: int, role: str) -> int:
    """Return `token_count`. Raises ModelError if the model has fewer rows."""
    needed = token_count(tokenizer)
    if rows < needed:
        raise ModelError(
            f"the {role} has {rows:,} embedding rows, but its tokenizer's ids go up to "
            f"{needed - 1:,}",
            where=f"{role}'s tokenizer",
            fix="use the matching tokenizer, or call resize_token_embeddings and train the added "
            "rows",
        )
    return needed


def tokenizer_identity(tokenizer: Any) -> dict[str, str]:
    """SHA-256 of the token → id map (`tokenizer`) and of the chat template (`template`)."""
    ids = json.dumps(sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]))
    template = json.dumps(tokenizer.chat_template, sort_keys=True)
    return {
        "tokenizer": hashlib.sha256(ids.encode()).hexdigest(),
        "template": hashlib.sha256(template.encode()).hexdigest(),
    }


def check_same_ids(teacher: Any, student: Any) -> None:
    """Raise ModelError if two tokenizers differ in the id of any token."""
    teacher_ids, student_ids = teacher.get_vocab(), student.get_vocab()
    differing = [
        token
        for token in sorted(teacher_ids.keys() | student_ids.keys())
        if teacher_ids.get(token) != student_ids.get(token)
    ]
    if not differing:
        return
    # Tokens with different ids are more informative than tokens that one vocabulary lacks.
    shared_first = sorted(differing, key=lambda t: not (t in teacher_ids and t in student_ids))
    examples = ", ".join(
        f"{token!r} ({teacher_ids.get(token, 'absent')} / {student_ids.get(token, 'absent')})"
        for token in shared_first[:3]
    )
    raise ModelError(
        f"teacher and student have different vocabularies: {len(differing):,} tokens differ, "
        f"e.g. {examples} (id in teacher / student)",
        where="the tokenizers' token → id maps",
        fix="choose a student from the teacher's family, prune the teacher, or distill through the "
        "tokens that both share (teacher.tokenizer: auto; in Python, Teacher.aligned)",
    )


def _warnings(teacher: Any, student: Any) -> list[str]:
    found = []
    if (teacher.chat_template or "") != (student.chat_template or ""):
        found.append(
            "teacher and student have different chat templates; the student's is used for chat "
            "rows, and the teacher may never have seen that format"
        )
    for role in ("bos_token", "eos_token"):
        ours, theirs = getattr(teacher, role, None), getattr(student, role, None)
        if ours != theirs:
            found.append(f"{role} is {ours!r} in the teacher and {theirs!r} in the student")
    return found

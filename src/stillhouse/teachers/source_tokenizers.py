"""The tokenizers of models that are on this disk, compared before a model is loaded."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from stillhouse.teachers.align_tokens import require_alignable
from stillhouse.teachers.load_model import load_config, load_tokenizer
from stillhouse.teachers.model_source import ModelSource
from stillhouse.teachers.shared_vocabulary import VocabularyMatch, check_same_vocabulary


@lru_cache(maxsize=64)
def other_tokenizer(own: ModelSource, other: ModelSource, trust_remote_code: bool) -> bool:
    """Whether two models have other tokens, so that one teaches the other through shared roots.

    Raises ModelError if their tokens cannot be aligned.
    """
    if own == other:
        return False
    student, teacher = (source_tokenizer(each, trust_remote_code) for each in (own, other))
    if student.get_vocab() == teacher.get_vocab():
        return False
    require_alignable(student, teacher)
    return True


def shared_vocabulary(
    teacher: ModelSource, student: ModelSource, trust_remote_code: bool
) -> VocabularyMatch:
    """Raises ModelError if the two models' tokens differ."""
    code = trust_remote_code
    return check_same_vocabulary(
        source_tokenizer(teacher, code),
        source_tokenizer(student, code),
        teacher_rows=head_rows(teacher, code),
        student_rows=head_rows(student, code),
    )


def source_tokenizer(source: ModelSource, trust_remote_code: bool) -> Any:
    return load_tokenizer(source.path, trust_remote_code=trust_remote_code)


def head_rows(source: ModelSource, trust_remote_code: bool) -> int:
    """Rows of a model's head."""
    config = load_config(source.path, trust_remote_code=trust_remote_code)
    return int(config.get_text_config().vocab_size)

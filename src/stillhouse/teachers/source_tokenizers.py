"""Comparison of models' tokenizers before the models are loaded."""

from __future__ import annotations

from functools import lru_cache

from stillhouse.teachers.align_tokens import require_alignable
from stillhouse.teachers.load_model import load_config, load_tokenizer
from stillhouse.teachers.model_source import ModelSource
from stillhouse.teachers.shared_vocabulary import VocabularyMatch, check_same_vocabulary


@lru_cache(maxsize=64)
def other_tokenizer(own: ModelSource, other: ModelSource) -> bool:
    """Whether two models have different tokens, so that distillation must use shared roots.

    Raises ModelError if their tokens cannot be aligned.
    """
    if own == other:
        return False
    student, teacher = load_tokenizer(own), load_tokenizer(other)
    if student.get_vocab() == teacher.get_vocab():
        return False
    require_alignable(student, teacher)
    return True


def shared_vocabulary(teacher: ModelSource, student: ModelSource) -> VocabularyMatch:
    """Compare the two models' tokens. Raises ModelError if they differ."""
    return check_same_vocabulary(
        load_tokenizer(teacher),
        load_tokenizer(student),
        teacher_rows=head_rows(teacher),
        student_rows=head_rows(student),
    )


def head_rows(source: ModelSource) -> int:
    """The number of rows in a model's head."""
    return int(load_config(source).get_text_config().vocab_size)

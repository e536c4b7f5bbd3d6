"""Token-by-token distillation requires that both models' ids mean the same tokens."""

from __future__ import annotations

import pytest

from stillhouse.errors import ModelError
from stillhouse.teachers.shared_vocabulary import check_same_vocabulary
from tests.teachers.toys import toy_tokenizer


def test_padding_rows_are_not_counted() -> None:
    match = check_same_vocabulary(
        toy_tokenizer(), toy_tokenizer(), teacher_rows=128, student_rows=96
    )
    assert (match.rows, match.teacher_padding, match.student_padding) == (96, 32, 0)
    assert match.warnings == ()


def test_equal_sizes_with_other_ids_are_rejected() -> None:
    with pytest.raises(ModelError, match="2 tokens differ") as caught:
        check_same_vocabulary(
            toy_tokenizer(), toy_tokenizer(swap=True), teacher_rows=96, student_rows=96
        )
    assert "'w0' (3 / 4)" in str(caught.value)
    assert "teacher.tokenizer: auto" in str(caught.value)


def test_the_error_names_a_missing_token() -> None:
    with pytest.raises(ModelError, match="1 tokens differ") as caught:
        check_same_vocabulary(
            toy_tokenizer(), toy_tokenizer(words=92), teacher_rows=96, student_rows=96
        )
    assert "'w92' (95 / absent)" in str(caught.value)


def test_an_added_special_token_is_rejected() -> None:
    student = toy_tokenizer()
    student.add_special_tokens({"additional_special_tokens": ["<think>"]})
    with pytest.raises(ModelError, match="<think>"):
        check_same_vocabulary(toy_tokenizer(), student, teacher_rows=128, student_rows=128)


def test_a_model_with_fewer_rows_than_ids_is_rejected() -> None:
    with pytest.raises(ModelError, match="student has 90 embedding rows"):
        check_same_vocabulary(toy_tokenizer(), toy_tokenizer(), teacher_rows=96, student_rows=90)


def test_different_templates_and_special_token_roles_are_warnings() -> None:
    student = toy_tokenizer(template="{{ messages[0].content }}")
    student.eos_token = "w5"
    match = check_same_vocabulary(toy_tokenizer(), student, teacher_rows=96, student_rows=96)
    assert "chat templates" in match.warnings[0]
    assert "eos_token is '</s>' in the teacher and 'w5' in the student" in match.warnings[1]

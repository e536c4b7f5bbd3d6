"""Checks that a teacher and a student agree on the end of an answer and on the chat template."""

from __future__ import annotations

from typing import Any

from stillhouse.data.chat_prompt import chat_ids
from stillhouse.data.turn_end import end_of_answers, turn_end
from stillhouse.errors import ModelError

_QUESTION = {"role": "user", "content": "Name one color."}
_CHATS = (
    (_QUESTION,),
    ({"role": "system", "content": "Answer in one word."}, _QUESTION),
    (_QUESTION, {"role": "assistant", "content": "Red."}, {**_QUESTION, "content": "Another."}),
)


def require_same_end(student: Any, teacher: Any) -> None:
    """Raise ModelError if one model ends its answers with a token at which the other does not stop.

    The student would never learn to end its answers, since the teacher expects a different token
    there. student, teacher: tokenizers. Nothing is checked if one is unknown or their ids differ.
    """
    if student is None or teacher is None:
        return
    sides = (("student", student, teacher), ("teacher", teacher, student))
    for name, own, other in sides:
        end = turn_end(own)
        if end is None or end.id in end_of_answers(other):
            continue
        if other.convert_tokens_to_ids(end.text) != end.id:
            continue  # a different tokenizer, whose end tokens are aligned with the student's
        other_end, other_name = turn_end(other), "teacher" if name == "student" else "student"
        stops = "no token" if other_end is None else other_end.text
        raise ModelError(
            f"the {name} ends its answers with {end.text}, but the {other_name} with {stops}, so "
            "the student would never learn to end its answers",
            where="train.on_policy",
            fix="copy the teacher's chat_template.jinja, tokenizer_config.json and "
            "generation_config.json into the student's folder; or remove on_policy",
        )


def differing_template(student: Any, teacher: Any) -> str | None:
    """Describe how the teacher's rendering of chats differs from the student's, which both models
    read; None if it does not."""
    if not getattr(teacher, "chat_template", None):
        return "the teacher has no chat template"
    for chat in _CHATS:
        try:
            own = chat_ids(student, chat)
        except Exception:  # a template is a program that can raise anything
            continue
        try:
            other = chat_ids(teacher, chat)
        except Exception as error:
            return f"the teacher's template rejects a chat that the student's accepts ({error})"
        if own != other:
            roles = ", ".join(message["role"] for message in chat)
            return (
                f"a chat of {roles} is {student.decode(own)!r} to the student, and "
                f"{teacher.decode(other)!r} to the teacher"
            )
    return None

"""The names of the models that an evaluation compares, in the order of its columns."""

from __future__ import annotations

ROLE_NAMES = {
    "teacher": "Teacher",
    "student": "Student, distilled",
    "untrained": "Student, untrained",
    "cut": "Student, not refit",
    "fine_tuned": "Student, fine-tuned",
    "quantized": "Student, quantized",
    "quantized_trained": "Student, QAT",
}


def role_name(role: str) -> str:
    """The role's display name; any other name, such as a family member's, is unchanged."""
    return ROLE_NAMES.get(role, role)


def role_order(role: str) -> int:
    """Position of a role among the columns; unknown roles come last."""
    return list(ROLE_NAMES).index(role) if role in ROLE_NAMES else len(ROLE_NAMES)

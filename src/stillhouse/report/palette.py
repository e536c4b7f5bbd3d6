"""The report's colors and names, one for each role, in the page and in the charts."""

from __future__ import annotations

INK = "#1c2430"
MUTED = "#5b6675"
RULE = "#dfe3e8"
ACCENT = "#b3541e"
SECOND = "#2b7a78"

ROLES = {
    "teacher": ("Teacher", "#47546b"),
    "student": ("Student, distilled", ACCENT),
    "untrained": ("Student, untrained", "#9aa3b0"),
    "fine_tuned": ("Student, fine-tuned", SECOND),
    "quantized": ("Student, quantized", "#7a5ba6"),
    "quantized_trained": ("Student, trained quantized", "#4b3f8f"),
}
"""Role: (name, color), in the order of the report's columns."""


def role_name(role: str) -> str:
    return ROLES[role][0] if role in ROLES else role.replace("_", " ")


def role_color(role: str) -> str:
    return ROLES[role][1] if role in ROLES else MUTED


def role_order(role: str) -> int:
    """Place of a role among the columns; unknown roles come last."""
    return list(ROLES).index(role) if role in ROLES else len(ROLES)

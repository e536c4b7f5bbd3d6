"""The report's colors, the same in the page and in the charts."""

from __future__ import annotations

INK = "#1c2430"
MUTED = "#5b6675"
RULE = "#dfe3e8"
ACCENT = "#b3541e"
PALE = "#e3b99f"
SECOND = "#2b7a78"

_ROLES = {
    "teacher": "#47546b",
    "student": ACCENT,
    "untrained": "#9aa3b0",
    "cut": "#c3c9d1",
    "fine_tuned": SECOND,
    "quantized": "#7a5ba6",
    "quantized_trained": "#4b3f8f",
}


def role_color(role: str) -> str:
    return _ROLES.get(role, MUTED)

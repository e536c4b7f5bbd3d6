"""What `check` finds out about a recipe before anything is spent."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from stillhouse.errors import StillhouseError

Level = Literal["ok", "estimate", "warning", "error"]


@dataclass(frozen=True)
class Finding:
    """One line of a check's output. fix: what to do about a warning or an error."""

    level: Level
    topic: str
    text: str
    fix: str | None = None


def finding_of(error: StillhouseError) -> Finding:
    """Convert an error to a finding."""
    where = f" ({error.where})" if error.where else ""
    topic = type(error).__name__.removesuffix("Error").lower()
    return Finding("error", topic, f"{error.what}{where}", error.fix)

"""What a check says about a recipe, before anything is spent."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Level = Literal["ok", "estimate", "warning", "error"]


@dataclass(frozen=True)
class Finding:
    """One line of a check. fix: what to do about a warning or an error."""

    level: Level
    topic: str
    text: str
    fix: str | None = None

"""What must hold before a run starts: told by `check`, and looked at by `run` before any stage."""

from __future__ import annotations

from collections.abc import Container
from typing import Any

from stillhouse.errors import RecipeError
from stillhouse.pipeline.kind import Kind
from stillhouse.progress import note


def require_all(kind: Kind, job: Any, *, only: Container[str] | None = None) -> None:
    """Raises StillhouseError where a step cannot succeed; notes what is doubtful.

    only: names of the steps to run; None for all.
    """
    for step in kind.steps:
        if step.require is None or (only is not None and step.name not in only):
            continue
        if not step.applies(job):
            continue
        for finding in step.require(job):
            if finding.level == "error":
                raise RecipeError(finding.text, where=finding.topic, fix=finding.fix)
            if finding.level == "warning":
                note(f"warning: {finding.text}" + (f" ({finding.fix})" if finding.fix else ""))

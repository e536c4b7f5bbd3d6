"""Requirements of a run: reported by `check`, and checked by `run` before the first stage."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from stillhouse.errors import RecipeError
from stillhouse.finding import Finding
from stillhouse.pipeline.kind import Kind
from stillhouse.progress import note


def require_all(kind: Kind, job: Any) -> None:
    """Raise StillhouseError if a step cannot succeed; print warnings."""
    for step in kind.steps:
        if step.require is not None and step.applies(job):
            require(step.require(job))


def require(findings: Iterable[Finding]) -> None:
    """Raise the first error, and print the warnings before it."""
    for finding in findings:
        if finding.level == "error":
            raise RecipeError(finding.text, where=finding.topic, fix=finding.fix)
        if finding.level == "warning":
            note(f"warning: {finding.text}" + (f" ({finding.fix})" if finding.fix else ""))

"""Checks a recipe before anything is spent: finds what would fail and estimates the cost."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from stillhouse.config.load_recipe import AnyRecipe, read_recipe
from stillhouse.errors import StillhouseError
from stillhouse.finding import Finding, finding_of
from stillhouse.hardware import tune_allocator
from stillhouse.kinds import kind_of
from stillhouse.pipeline.engine import run_folder
from stillhouse.pipeline.kind import Check

STYLES = {"ok": "green", "estimate": "cyan", "warning": "yellow", "error": "bold red"}


def check_recipe(
    recipe: AnyRecipe | Mapping[str, Any] | str | Path,
    overrides: Sequence[str] = (),
    *,
    base: Path | None = None,
    calls: int = 0,
) -> list[Finding]:
    """Return all findings in the run's order; an error skips the checks that depend on it.

    calls: the number of requests to send to a text teacher, to estimate the cost of the rest.
    No weights are loaded (except a local text teacher's, for `calls`) and nothing is trained. For
    a Hub model, only the configuration and tokenizer are downloaded; a GGUF file is converted,
    because its configuration and tokenizer do not exist until then.
    """
    tune_allocator()
    findings: list[Finding] = []
    try:
        path = Path(recipe) if isinstance(recipe, str | Path) else Path("RECIPE")
        recipe, base = read_recipe(recipe, overrides, base)
        findings.append(Finding("ok", "recipe", f"{path} is valid"))
        findings.append(_folder(run_folder(recipe).root))
        kind = kind_of(recipe)
        check = Check(path, kind.find_to_check(recipe, base), calls)
        for step in kind.steps:  # findings are added one by one: an error keeps those before it
            if step.require is not None:
                for finding in step.require(check.job):
                    findings.append(finding)
            if step.check is not None:
                for finding in step.check(check):
                    findings.append(finding)
    except StillhouseError as error:
        findings.append(finding_of(error))
    return findings


def findings_table(findings: Sequence[Finding]) -> Table:
    table = Table(show_header=False, box=None, padding=(0, 1))
    for finding in findings:
        fix = f"\n{finding.fix}" if finding.fix else ""
        level = Text(finding.level, STYLES[finding.level])
        topic = Text(finding.topic, "bold")
        table.add_row(level, topic, Text.assemble(finding.text, (fix, "dim")))
    return table


def _folder(folder: Path) -> Finding:
    existing = next(parent for parent in [folder, *folder.absolute().parents] if parent.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        fix = "use another folder: --set folder=PATH"
        return Finding("error", "run folder", f"{folder} is not writable", fix)
    return Finding("ok", "run folder", str(folder))

"""Figures about answers for the terminal."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table

from stillhouse.evaluate.answers import AnswersEvaluation
from stillhouse.report.answers_page import answer_measures, field_rows
from stillhouse.report.palette import role_name


def answers_table(found: AnswersEvaluation) -> RenderableType:
    table = Table(title=f"{found.texts:,} test texts")
    table.add_column("")
    for result in found.results:
        table.add_column(role_name(result.role), justify="right")
    for name, cells in answer_measures(found):
        table.add_row(name, *cells)
    for name, cells in field_rows(found):
        table.add_row(f"  F1 of {name}", *cells, style="dim")
    return Group(table, *found.notes)

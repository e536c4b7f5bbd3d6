"""A classifier's figures for the terminal."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table

from stillhouse.evaluate.classification import ClassificationEvaluation
from stillhouse.report.classifier_page import abstention_sentence, measures
from stillhouse.report.palette import role_name


def classifier_table(found: ClassificationEvaluation) -> RenderableType:
    table = Table(title=f"{found.texts:,} test texts, {len(found.labels)} labels")
    table.add_column("")
    for result in found.results:
        table.add_column(role_name(result.role), justify="right")
    for name, cells in measures(found):
        table.add_row(name, *cells)
    return Group(table, abstention_sentence(found.abstention), *found.notes)

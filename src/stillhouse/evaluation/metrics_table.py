"""A table for the terminal, the report, and the model card.

The report's template renders it as HTML; the other two renderers are here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from stillhouse.markdown import inert
from stillhouse.number_format import NBSP


@dataclass(frozen=True)
class Column:
    """A column's heading. role: the role of the column's model; empty for other columns."""

    name: str
    role: str = ""


@dataclass(frozen=True)
class Cell:
    """A value. remark: relates it to a different value, such as "80% of teacher"."""

    value: str
    remark: str = ""


@dataclass(frozen=True)
class Row:
    """A row. definition: how it is measured. strong: whether it stands out, such as a total."""

    name: str
    cells: list[Cell]
    definition: str = ""
    strong: bool = False


@dataclass(frozen=True)
class MetricsTable:
    """A table.

    title: the text or data that was measured on.
    notes: caveats about the values.
    corner: the heading of the row names.
    """

    title: str
    columns: list[Column]
    rows: list[Row]
    notes: list[str] = field(default_factory=list)
    corner: str = ""

    @classmethod
    def of_text(
        cls, heads: Sequence[str], rows: Iterable[Sequence[str]], total: Sequence[str] = ()
    ) -> MetricsTable:
        """Build a table of plain cells. The first of `heads` is the corner, and each row starts
        with its name. total: a last row that stands out."""
        corner, *columns = heads
        found = [Row(name, [Cell(value) for value in values]) for name, *values in rows]
        if total:
            found.append(Row(total[0], [Cell(value) for value in total[1:]], strong=True))
        return cls("", [Column(name) for name in columns], found, corner=corner)

    @property
    def definitions(self) -> list[str]:
        """All definitions without repetition, in row order."""
        return list(dict.fromkeys(row.definition for row in self.rows if row.definition))


def to_rich(table: MetricsTable) -> RenderableType:
    """Render for the terminal, with remarks on a second line and notes below the table."""
    drawn = Table(title=table.title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    drawn.add_column(table.corner, overflow="fold")
    for column in table.columns:
        drawn.add_column(column.name, justify="right", overflow="fold")
    for row in table.rows:
        cells = [
            Text.assemble(cell.value, (f"\n{cell.remark}" if cell.remark else "", "dim"))
            for cell in row.cells
        ]
        drawn.add_row(Text(row.name), *cells, style="bold" if row.strong else None)
    return Group(drawn, *map(Text, table.notes))


def to_markdown(table: MetricsTable) -> str:
    """Render for a model card: title, table, definitions, and notes."""
    heads = [table.corner, *(column.name for column in table.columns)]
    rows = [[row.name, *map(_in_one, row.cells)] for row in table.rows]
    lines = ["| " + " | ".join(map(_escaped, line)) + " |" for line in (heads, *rows)]
    lines.insert(1, "|" + " --- |" * len(heads))
    parts = [f"{table.title}:" if table.title else "", "\n".join(lines)]
    parts.append("\n".join(f"- {inert(one)}" for one in [*table.definitions, *table.notes]))
    return "\n\n".join(part for part in parts if part)


def _in_one(cell: Cell) -> str:
    return f"{cell.value} ({cell.remark})" if cell.remark else cell.value


def _escaped(text: str) -> str:
    return inert(text.replace(NBSP, " "))

"""The report: sections as plain data in a JSON file, and the HTML page rendered from them."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Annotated

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from pydantic import Field, TypeAdapter, ValidationError

from stillhouse.atomic_files import write_atomically
from stillhouse.checksums import seal_broken, sealed
from stillhouse.disk_errors import disk_errors
from stillhouse.errors import RunError
from stillhouse.evaluation.metrics_table import MetricsTable
from stillhouse.report.charts import Chart, role_color
from stillhouse.runfolder import record_again

REPORT, FAMILY_REPORT, REPORT_DATA = "report.html", "family.html", "report.json"
"""A run's page, a family's page, and the data file next to either."""


@dataclass(frozen=True)
class Figure:
    """A key figure: a number, its name, and a remark that compares it."""

    value: str
    name: str
    remark: str = ""


@dataclass(frozen=True)
class Token:
    """A part of a text. level: its background, from 0 (none) to 4. title: shown on hovering."""

    text: str
    level: int
    title: str = ""


@dataclass(frozen=True)
class Answer:
    """One model's answer. color: the color of the line above the text. tokens: the text in parts;
    if empty, `text` is shown."""

    name: str
    text: str
    color: str
    tokens: list[Token] = field(default_factory=list)


@dataclass(frozen=True)
class SideBySide:
    """Each model's answer to one prompt."""

    prompt: str
    answers: list[Answer]


@dataclass(frozen=True)
class Folded:
    """A collapsed part: preformatted text, or facts."""

    title: str
    text: str = ""
    facts: list[tuple[str, str]] = field(default_factory=list)


@dataclass(frozen=True)
class Section:
    """A section of the page, which shows the nonempty fields in this order.

    id: an anchor that is unique on the page; empty for a part of another section. lead, table,
    small: text above the table, the table, and small print below it. facts: (name, value) pairs.
    legend: explains the levels of tokens in `texts`. links: (name, address) pairs.
    """

    title: str
    id: str = ""
    lead: str = ""
    table: MetricsTable | None = None
    small: str = ""
    charts: list[Annotated[Chart, Field(discriminator="kind")]] = field(default_factory=list)
    facts: list[tuple[str, str]] = field(default_factory=list)
    legend: list[Token] = field(default_factory=list)
    texts: list[SideBySide] = field(default_factory=list)
    items: list[str] = field(default_factory=list)
    folded: list[Folded] = field(default_factory=list)
    links: list[tuple[str, str]] = field(default_factory=list)
    parts: list[Section] = field(default_factory=list)

    @property
    def is_empty(self) -> bool:
        shown = (self.charts, self.facts, self.texts, self.items, self.folded, self.links)
        return not (self.table or self.small or any(shown) or any(self.parts))


@dataclass(frozen=True)
class Report:
    """A report. kind: distillation, classifier, answers, or family. title: the run's name. created:
    date and time as text. remarks: lines below the headline."""

    kind: str
    title: str
    created: str
    headline: str
    teacher: str = ""
    remarks: list[str] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    sections: list[Section] = field(default_factory=list)

    def section(self, id_: str) -> Section | None:
        return next((section for section in self.sections if section.id == id_), None)


def write_report(report: Report, page: Path) -> None:
    """Write the page, and its data next to it as `report.json`.

    Raises RunError if the folder is not writable or the disk is full.
    """
    write_page(report, page)
    data = json.dumps(sealed(asdict(report)), indent=1, ensure_ascii=False)
    with disk_errors(page):
        write_atomically(page.with_name(REPORT_DATA), data)


def write_page(report: Report, path: Path) -> None:
    """Write only the page; `path` always contains either the entire old page or the entire new
    page."""
    if path.exists() and not path.is_file():
        kind = "a folder" if path.is_dir() else "a device"
        raise RunError(f"the report's path is {kind}", where=path, fix="pass the path of a file")
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, render(report))


def read_report(path: Path) -> Report:
    """Read a report's data. Raises RunError if `report.json` is missing, damaged, or from an older
    version."""
    try:
        data = path.read_bytes()
        report = TypeAdapter(Report).validate_json(data)
    except OSError as error:
        raise RunError(
            f"the report's data cannot be read: {error.strerror}",
            where=path,
            fix="check the path and its permissions, or rerun `stillhouse run`",
        ) from error
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "its text"
        raise RunError(
            f"this is not report data from this version: {place}: {first['msg']}",
            where=path,
            fix="rerun `stillhouse run` to write a new report",
        ) from error
    if seal_broken(json.loads(data)):
        raise RunError(
            "the report's data is damaged: it has changed since it was written",
            where=path,
            fix="rerun `stillhouse run` to write a new report",
        )
    return report


def steps_table(page: Path) -> MetricsTable | None:
    """Return the table of what each step of a run changed, from its report's data; None if the
    report has no such section. Raises RunError like `read_report`."""
    section = read_report(page.resolve().with_name(REPORT_DATA)).section("steps")
    return None if section is None else section.table


def redraw_report(folder: Path, out: Path | None = None) -> Path:
    """Render a run folder's page again from its data. out: by default, the run's own page.

    Returns the page's path. Raises RunError.
    """
    family = folder / FAMILY_REPORT
    page = (family if family.exists() else folder / REPORT).resolve()
    report = read_report(page.with_name(REPORT_DATA))
    write_page(report, out or page)
    if out is None:
        record_again(page)
    return out or page


def render(report: Report) -> str:
    """Render the page, escaping every string in the report."""
    return environment("report").get_template("page.html.j2").render(report=report)


def svg(chart: Chart, key: str) -> Markup:
    """Render a chart as an element of the page. key: unique on the page."""
    from stillhouse.report.draw_charts import draw  # matplotlib takes a second to import

    return Markup(draw(chart, key))


@cache
def environment(folder: str) -> Environment:
    """Return the templates in one of this package's folders, and the report's, whose
    `section.html.j2` renders sections."""
    found = Environment(
        loader=ChoiceLoader([PackageLoader("stillhouse", name) for name in (folder, "report")]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    css = (Path(__file__).parent / "report.css").read_text(encoding="utf-8")
    found.globals["css"] = Markup(css)
    found.filters["svg"] = svg
    found.filters["color"] = role_color
    return found

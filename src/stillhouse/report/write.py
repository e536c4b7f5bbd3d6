"""Writes the report: one HTML file that needs nothing else."""

from __future__ import annotations

import os
import tempfile
from functools import cache
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from stillhouse.errors import RunError
from stillhouse.report.report_data import ReportData
from stillhouse.report.view import build_page
from stillhouse.runfolder import disk_errors


def write_report(data: ReportData, path: Path) -> None:
    """Writes `data` as one offline HTML page; `path` holds the old page or the new one, whole.

    Raises RunError where the folder cannot be written or the disk is full.
    """
    write_page(render_report(data), path)


def write_page(page: str, path: Path) -> None:
    """Raises RunError where the folder cannot be written or the disk is full."""
    if path.is_dir():
        raise RunError("a folder has the report's name", where=path, fix="give a file's name")
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _replace(path, page.encode("utf-8"))


def render_report(data: ReportData) -> str:
    """The page as text; every string of `data` is escaped."""
    return environment().get_template("template.html.j2").render(page=build_page(data))


@cache
def environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("stillhouse", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    folder = Path(__file__).parent
    environment.globals["css"] = Markup((folder / "report.css").read_text(encoding="utf-8"))
    return environment


def _replace(path: Path, content: bytes) -> None:
    """Writes beside `path`, flushes to the disk, then takes its name."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        Path(name).chmod(0o644)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise

"""Text from a model, a server, or a file name cannot control the terminal."""

from __future__ import annotations

import io
import json

import pytest
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from stillhouse.errors import RunError
from stillhouse.terminal import Terminal, json_line, visible, write_output

CLEAR = "\x1b[2J\x1b]0;title\x07"
TURNED = "abc\u202etxt.exe\x9b2J\x7f"


def shown(*things: object, **options: object) -> str:
    file = io.StringIO()
    console = Terminal(file=file, width=100, **options)
    for thing in things:
        console.print(thing)
    return file.getvalue()


def test_control_characters_are_made_visible_everywhere() -> None:
    table = Table(CLEAR)
    table.add_row(Text(CLEAR + "wide enough", "red"), TURNED)
    text = shown(CLEAR, table, Panel(TURNED), Text(CLEAR))
    assert not set(text) & set("\x1b\x07\x9b\x7f\u202e")
    assert text.count("␛[2J␛]0;title") == 4
    assert "abc\\u202etxt.exe\\u009b2J␡" in text


def test_styles_are_kept() -> None:
    text = shown(Text("plain " + CLEAR, "bold"), force_terminal=True, color_system="standard")
    assert text == "\x1b[1mplain ␛[2J␛]0;title\x1b[0m\n"


def test_a_string_is_not_read_as_markup_or_emoji() -> None:
    file = io.StringIO()
    Terminal(file=file).write_line("report  runs/a[/x][red]:smile:/report.html " + "x" * 200)
    assert file.getvalue() == "report  runs/a[/x][red]:smile:/report.html " + "x" * 200 + "\n"


def test_newlines_and_tabs_are_kept() -> None:
    assert visible("a\n\tb\r") == "a\n\tb␍"


def test_a_json_line_reads_back_unchanged() -> None:
    value = {"text": CLEAR + TURNED + "naïve"}
    assert json.loads(json_line(value)) == value
    assert not set(json_line(value)) & set("\x1b\x07\x9b\x7f\u202e")


def test_a_json_line_is_json_in_any_encoding_of_the_output(monkeypatch: pytest.MonkeyPatch) -> None:
    value, written = {"text": "né中😀"}, io.BytesIO()
    output = io.TextIOWrapper(written, encoding="ascii", errors="backslashreplace")
    monkeypatch.setattr("sys.stdout", output)
    write_output(json_line(value))
    assert json.loads(written.getvalue()) == value


def test_a_line_break_in_a_path_adds_no_line_to_an_error() -> None:
    error = RunError("it is full", where="/data/a\n  fix:   run this", fix="free some space")
    assert str(error).splitlines() == [
        "it is full",
        "  where: /data/a␊  fix:   run this",
        "  fix:   free some space",
    ]

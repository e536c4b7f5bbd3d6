"""Notes for the user."""

from __future__ import annotations

import pytest

from stillhouse.progress import note


@pytest.mark.parametrize("text", ["[/x] [bold]", "a :smile: b", "row [0]: [red]"])
def test_markup_in_a_note_is_shown_literally(capsys: pytest.CaptureFixture[str], text: str) -> None:
    note(f"the text {text} has two labels")
    assert f"the text {text} has two labels" in capsys.readouterr().err

"""What tests of requests to an endpoint share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from stillhouse.generation import client as client_module
from stillhouse.generation.http_link import OpenAILink
from stillhouse.generation.journal import Journal


@pytest.fixture(params=["http", "openai"])
def link(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every fault must look the same through either way to the server."""
    if request.param == "openai":
        monkeypatch.setattr(client_module, "HttpLink", OpenAILink)


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    with Journal(tmp_path / "answers.sqlite") as journal:
        yield journal
